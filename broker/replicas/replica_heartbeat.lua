#!lua flags=allow-oom
-- REPLICA_HEARTBEAT: a replica is alive. One that has the newest weights also keeps the writer lock
-- and the open batch's lease.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)
--       4 writer:<policy> (string)  5 batches (stream)  6 state (hash)
-- ARGV  1 id  2 milliseconds to hold the lock  3 policy (consumer group)
-- reply 1 | 0 (no member: it was evicted, or others were founded)
-- The lock outlives every single heartbeat: where all fall silent at once, because Redis was away,
-- they have as long to come back before anyone may go back to a checkpoint. Replicas without the
-- newest weights don't keep it: alone they could do nothing with it.
--- @include fence
--- @include now
local replicas, members, beats, writer, batches, state = unpack(KEYS)
local id, hold_ms, policy = unpack(ARGV)

local function field(name) return redis.call('HGET', replicas, name) end

if not redis.call('ZSCORE', members, id) then return 0 end
redis.call('ZADD', beats, whole(now_ms()), id)
if field('at:' .. id) ~= field('step') then return 1 end
local token, holder = 'replicas-' .. field('generation'), redis.call('GET', writer)
if holder and holder ~= token then return 1 end
redis.call('SET', writer, token, 'PX', hold_ms)
-- who held it before has it no more
if not holder then redis.call('HSET', state, 'taken:' .. policy, token) end
local open = field('open')
if open and is_lent_to_replicas(batches, policy, open) then
  redis.call('XCLAIM', batches, policy, 'replicas', 0, open .. '-0', 'IDLE', 0, 'JUSTID')
end
return 1
