#!lua flags=allow-oom
-- EVICT: take away the replicas that are silent for too long, or that go. The others meet anew, in the next epoch.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)  4 writer:<policy> (string)
--       5 control (stream)
-- ARGV  1 milliseconds of silence that are too long  2 '1' if those that go now do so for good  3… pairs: an id, its own limit (0: it goes now)
-- reply number evicted
-- Where the last one goes for good, the writer lock is free: nobody is waited for.
-- What an evicted one had claimed is claimed by others; its gradients count for nothing.
-- include log_event
local limits, gone, left, time = {}, {}, 0, redis.call('TIME')
for i = 3, #ARGV, 2 do limits[ARGV[i]] = tonumber(ARGV[i + 1]) end
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local silent = now - tonumber(redis.call('ZSCORE', KEYS[3], id) or '0')
  local limit = limits[id] or tonumber(ARGV[1])
  if limit == 0 then left = left + 1 end
  if limit == 0 or silent > limit then gone[#gone + 1] = {id, limit == 0 and 'it left' or ('silent for ' .. silent .. ' ms')} end
end
if #gone == 0 then return 0 end

local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
for _, found in ipairs(gone) do
  redis.call('ZREM', KEYS[2], found[1])
  redis.call('ZREM', KEYS[3], found[1])
  redis.call('HDEL', KEYS[1], 'at:' .. found[1], 'vote:' .. found[1], 'trained:' .. found[1], 'since:' .. found[1])
  log_event(KEYS[5], 'event', 'evicted', 'who', found[1], 'detail', found[2] .. ', epoch ' .. epoch)
end
if ARGV[2] == '1' and left == #gone and redis.call('ZCARD', KEYS[2]) == 0
  and redis.call('GET', KEYS[4]) == 'replicas-' .. redis.call('HGET', KEYS[1], 'generation') then
  redis.call('DEL', KEYS[4])
end
return #gone
