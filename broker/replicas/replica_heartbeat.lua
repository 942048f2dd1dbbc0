#!lua flags=allow-oom
-- REPLICA_HEARTBEAT: a replica is alive. One that has the newest weights also keeps the writer lock and the open batch's lease.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)  4 writer:<policy> (string)
--       5 batches (stream)  6 state (hash)
-- ARGV  1 id  2 milliseconds to hold the lock  3 policy (consumer group)
-- reply 1 | 0 (no member: it was evicted, or others were founded)
-- The lock outlives every single heartbeat: where all fall silent at once, because Redis was away, they have as long to
-- come back before anyone may go back to a checkpoint. Replicas without the newest weights don't keep it: alone they
-- could do nothing with it.
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 0 end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[3], string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), ARGV[1])
local found = redis.call('HMGET', KEYS[1], 'generation', 'step', 'open', 'at:' .. ARGV[1])
local token, holder = 'replicas-' .. found[1], redis.call('GET', KEYS[4])
if found[4] ~= found[2] or (holder and holder ~= token) then return 1 end
redis.call('SET', KEYS[4], token, 'PX', ARGV[2])
if not holder then redis.call('HSET', KEYS[6], 'taken:' .. ARGV[3], token) end  -- who held it before has it no more
if found[3] then
  local id = found[3] .. '-0'
  local pending = redis.call('XPENDING', KEYS[5], ARGV[3], id, id, 1)
  if #pending > 0 and pending[1][2] == 'replicas' then
    redis.call('XCLAIM', KEYS[5], ARGV[3], 'replicas', 0, id, 'IDLE', 0, 'JUSTID')
  end
end
return 1
