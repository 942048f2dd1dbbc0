#!lua flags=allow-oom
-- NOTE_TRAINER_CALL: an HTTP trainer called. It is known by then, or there is no room for another.
-- KEYS  1 trainers (hash: http:<trainer> -> when it was here last, seconds since 1970)
--       2 batches (stream)
-- ARGV  1 http:<trainer>  2 now, seconds since 1970  3 policy (consumer group)
--       4 trainers that may be known
--       5 seconds after which the longest silent one is forgotten, where there is no room
-- reply 1 | 0 (there is no room)
-- A consumer to whom a batch is lent stays one, and with it the batch.
local trainers, batches = unpack(KEYS)
local trainer, now, policy = unpack(ARGV, 1, 3)
local most, silent_s = tonumber(ARGV[4]), ARGV[5]

-- How many are known; and the longest silent one, if it was silent for long enough.
local function look()
  local fields = redis.call('HGETALL', trainers)
  local count, oldest, since = 0, nil, now - silent_s
  for i = 1, #fields, 2 do
    if string.find(fields[i], '^http:') then
      local at = tonumber(fields[i + 1]) or 0
      count = count + 1
      if at <= since then oldest, since = fields[i], at end
    end
  end
  return count, oldest
end

local function forget(name)
  redis.call('HDEL', trainers, name)
  local lent = redis.pcall('XPENDING', batches, policy, '-', '+', 1, name)
  if not lent.err and #lent == 0 then
    redis.pcall('XGROUP', 'DELCONSUMER', batches, policy, name)
  end
end

-- the hash has other fields, too: only where it is large enough they are looked at one by one
if redis.call('HEXISTS', trainers, trainer) == 0 and redis.call('HLEN', trainers) >= most then
  local count, oldest = look()
  if count >= most then
    if not oldest then return 0 end
    forget(oldest)
  end
end
redis.call('HSET', trainers, trainer, now)
return 1
