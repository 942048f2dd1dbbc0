#!lua flags=allow-oom
-- NOTE_TRAINER_CALL: an HTTP trainer called. It is known by then, or there is no room for another.
-- KEYS  1 trainers (hash: http:<trainer> -> when it was here last, seconds since 1970)  2 batches (stream)
-- ARGV  1 http:<trainer>  2 now, seconds since 1970  3 policy (consumer group)  4 trainers that may be known
--       5 seconds after which the longest silent one is forgotten, where there is no room
-- reply 1 | 0 (there is no room)
-- A consumer to whom a batch is lent stays one, and with it the batch.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then
  local fields, oldest, since, count = redis.call('HGETALL', KEYS[1]), nil, ARGV[2] - ARGV[5], 0
  for i = 1, #fields, 2 do
    if string.find(fields[i], '^http:') then
      local at = tonumber(fields[i + 1]) or 0
      count = count + 1
      if at <= since then oldest, since = fields[i], at end
    end
  end
  if count >= tonumber(ARGV[4]) then
    if not oldest then return 0 end
    redis.call('HDEL', KEYS[1], oldest)
    local lent = redis.pcall('XPENDING', KEYS[2], ARGV[3], '-', '+', 1, oldest)
    if not lent.err and #lent == 0 then redis.pcall('XGROUP', 'DELCONSUMER', KEYS[2], ARGV[3], oldest) end
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
