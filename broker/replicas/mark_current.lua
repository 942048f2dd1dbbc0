#!lua flags=allow-oom
-- MARK_CURRENT: a replica has got the newest weights from another one, and counts from now on.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)
-- ARGV  1 id  2 generation  3 epoch  4 step of the weights it got
-- reply "healed" | "moved" (another epoch, or another step)
--- @include fence
local replicas, members = unpack(KEYS)
local id, generation, epoch, step = unpack(ARGV)
if not is_current(replicas, members, id, generation, epoch) then return 'moved' end
if redis.call('HGET', replicas, 'step') ~= step then return 'moved' end
redis.call('HSET', replicas, 'at:' .. id, step)
return 'healed'
