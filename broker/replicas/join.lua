#!lua flags=allow-oom
-- JOIN: become one of a policy's living replicas. Everyone meets anew, in the next epoch.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)  4 writer:<policy> (string)
--       5 control (stream)
-- ARGV  1 id, new for every life  2 generation and 3 step of the weights it holds (-1: none of any use)
-- reply { "joined", generation, epoch } | { "nobody" } (no replicas hold the writer lock: they are to be founded)
-- include log_event
local generation = redis.call('HGET', KEYS[1], 'generation')
if not generation or redis.call('GET', KEYS[4]) ~= 'replicas-' .. generation then return {'nobody'} end
if redis.call('ZSCORE', KEYS[2], ARGV[1]) then
  return {'joined', tonumber(generation), tonumber(redis.call('HGET', KEYS[1], 'epoch'))}
end

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('ZADD', KEYS[2], redis.call('HINCRBY', KEYS[1], 'joined', 1), ARGV[1])
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('HSET', KEYS[1], 'at:' .. ARGV[1], ARGV[2] == generation and ARGV[3] or '-1', 'since:' .. ARGV[1], now)
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
log_event(KEYS[5], 'event', 'joined', 'who', ARGV[1], 'detail', 'epoch ' .. epoch)
return {'joined', tonumber(generation), epoch}
