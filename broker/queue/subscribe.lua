#!lua flags=allow-oom
-- SUBSCRIBE: make a policy a reader of all batches that are still there; Redis may be full when its trainer comes.
-- KEYS  1 batches (stream)  2 state (hash)  3 settings (hash)
-- ARGV  1 policy (consumer group)  2 how it reads as a shadow, '<lossless or lossy> <batches it may be behind>'; '' if it is none
-- reply 1 if it is new, else 0
-- For one that comes late it is noted how many groups had come and gone by then, and which step was formed last.
local batches, state, policy = KEYS[1], KEYS[2], ARGV[1]
local function rule()
  if ARGV[2] == '' then redis.call('HDEL', KEYS[3], 'shadow:' .. policy)
  else redis.call('HSET', KEYS[3], 'shadow:' .. policy, ARGV[2]) end
end

if redis.call('EXISTS', batches) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', batches)) do
    if group[2] == policy then
      rule()
      return 0
    end
  end
end
local counted = redis.call('HMGET', state, 'accepted', 'groups', 'dead', 'purged', 'formed')
local gone = tonumber(counted[1] or '0')
for i = 2, 4 do gone = gone - tonumber(counted[i] or '0') end
if tonumber(counted[5] or '0') > 0 then
  for _, batch in ipairs(redis.call('XRANGE', batches, '-', '+')) do
    for i = 1, #batch[2], 2 do
      if batch[2][i] == 'gids' then gone = gone - select(2, string.gsub(batch[2][i + 1], '%S+', '')) end
    end
  end
  redis.call('HSET', state, 'unseen:' .. policy, string.format('%.0f', gone), 'joined:' .. policy, counted[5])
end
rule()
redis.call('XGROUP', 'CREATE', batches, policy, '0', 'MKSTREAM')
return 1
