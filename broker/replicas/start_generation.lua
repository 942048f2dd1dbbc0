#!lua flags=allow-oom
-- START_GENERATION: begin a policy's replicas anew with one that has brought its weights to the end of the ledger: a new generation.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)  4 work:<policy> (stream)
--       5 meeting:<policy> (hash)  6 writer:<policy> (string)  7 ledger:<policy> (stream)  8 control (stream)
-- ARGV  1 id  2 token with which it holds the writer lock  3 step of its weights  4 milliseconds to hold the lock for all replicas
-- reply { "founded", generation, epoch } (now, or by a call whose reply was lost) | { "fenced" } (the lock is another's)
--       | { "behind" } (the ledger ends at another step)
-- The lock goes from the founder to the generation. Whoever was a member is none any more, and can commit nothing.
-- include log_event
local generation = tonumber(redis.call('HGET', KEYS[1], 'generation') or '0')
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
local holder = redis.call('GET', KEYS[6])
if holder == 'replicas-' .. generation and redis.call('ZSCORE', KEYS[2], ARGV[1]) then return {'founded', generation, epoch} end
if holder ~= ARGV[2] then return {'fenced'} end
local newest, step = redis.call('XREVRANGE', KEYS[7], '+', '-', 'COUNT', 1), '0'
if #newest > 0 then step = string.match(newest[1][1], '^%d+') end
if step ~= ARGV[3] then return {'behind'} end

local time = redis.call('TIME')
generation, epoch = generation + 1, epoch + 1
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
redis.call('SET', KEYS[6], 'replicas-' .. generation, 'PX', ARGV[4])
redis.call('HSET', KEYS[1], 'generation', generation, 'epoch', epoch, 'joined', 1, 'step', step, 'at:' .. ARGV[1], step,
  'since:' .. ARGV[1], now)
redis.call('ZADD', KEYS[2], 1, ARGV[1])
redis.call('ZADD', KEYS[3], now, ARGV[1])
log_event(KEYS[8], 'event', 'founded', 'who', ARGV[1], 'detail', 'generation ' .. generation .. ' from step ' .. step)
return {'founded', generation, epoch}
