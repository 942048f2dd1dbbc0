#!lua flags=allow-oom
-- JOIN: become one of a policy's living replicas. Everyone meets anew, in the next epoch.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)
--       4 writer:<policy> (string)  5 control (stream)
-- ARGV  1 id, new for every life
--       2 generation and 3 step of the weights it holds (-1: none of any use)
-- reply { "joined", generation, epoch }
--       | { "nobody" } (no replicas hold the writer lock: they are to be founded)
--- @include log_event
--- @include now
local replicas, members, beats, writer, control = unpack(KEYS)
local id, weights_of, weights_at = unpack(ARGV)
local generation = redis.call('HGET', replicas, 'generation')
if not generation or redis.call('GET', writer) ~= 'replicas-' .. generation then
  return {'nobody'}
end
if redis.call('ZSCORE', members, id) then
  return {'joined', tonumber(generation), tonumber(redis.call('HGET', replicas, 'epoch'))}
end

local now = whole(now_ms())
local at = weights_of == generation and weights_at or '-1'
redis.call('ZADD', members, redis.call('HINCRBY', replicas, 'joined', 1), id)
redis.call('ZADD', beats, now, id)
redis.call('HSET', replicas, 'at:' .. id, at, 'since:' .. id, now)
local epoch = redis.call('HINCRBY', replicas, 'epoch', 1)
log_event(control, 'event', 'joined', 'who', id, 'detail', 'epoch ' .. epoch)
return {'joined', tonumber(generation), epoch}
