#!lua flags=allow-oom
-- SUBSCRIBE: make a policy a reader of all batches that are still there; Redis may be full when its trainer comes.
-- KEYS  1 batches (stream)
-- ARGV  1 policy (consumer group)
-- reply 1 if it is new, else 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    if group[2] == ARGV[1] then return 0 end
  end
end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
return 1
