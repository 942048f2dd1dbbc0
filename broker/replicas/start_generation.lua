#!lua flags=allow-oom
-- START_GENERATION: begin a policy's replicas anew with one that has brought its weights to the end
-- of the ledger: a new generation.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)
--       4 work:<policy> (stream)  5 meeting:<policy> (hash)  6 writer:<policy> (string)
--       7 ledger:<policy> (stream)  8 control (stream)
-- ARGV  1 id  2 token with which it holds the writer lock  3 step of its weights
--       4 milliseconds to hold the lock for all replicas
-- reply { "founded", generation, epoch } (now, or by a call whose reply was lost)
--       | { "fenced" } (the lock is another's) | { "behind" } (the ledger ends at another step)
-- The lock goes from the founder to the generation. Whoever was a member is none any more, and can
-- commit nothing.
--- @include log_event
--- @include now
local replicas, members, beats, work, meeting, writer, ledger, control = unpack(KEYS)
local id, token, step, hold_ms = unpack(ARGV)

local function number(field) return tonumber(redis.call('HGET', replicas, field) or '0') end

local function newest_trained()
  local newest = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', 1)[1]
  return newest and string.match(newest[1], '^%d+') or '0'
end

local generation, epoch = number('generation'), number('epoch')
local holder = redis.call('GET', writer)
if holder == 'replicas-' .. generation and redis.call('ZSCORE', members, id) then
  return {'founded', generation, epoch}
end
if holder ~= token then return {'fenced'} end
if newest_trained() ~= step then return {'behind'} end

generation, epoch = generation + 1, epoch + 1
local now = whole(now_ms())
redis.call('DEL', replicas, members, beats, work, meeting)
redis.call('SET', writer, 'replicas-' .. generation, 'PX', hold_ms)
redis.call('HSET', replicas, 'generation', generation, 'epoch', epoch, 'joined', 1, 'step', step,
  'at:' .. id, step, 'since:' .. id, now)
redis.call('ZADD', members, 1, id)
redis.call('ZADD', beats, now, id)
local detail = 'generation ' .. generation .. ' from step ' .. step
log_event(control, 'event', 'founded', 'who', id, 'detail', detail)
return {'founded', generation, epoch}
