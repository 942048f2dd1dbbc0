#!lua flags=allow-oom
-- MARK_CURRENT: a replica has got the newest weights from another one, and counts from now on.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)
-- ARGV  1 id  2 generation  3 epoch  4 step of the weights it got
-- reply "healed" | "moved" (another epoch, or another step)
local found = redis.call('HMGET', KEYS[1], 'generation', 'epoch', 'step')
if found[1] ~= ARGV[2] or found[2] ~= ARGV[3] or found[3] ~= ARGV[4] then return 'moved' end
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 'moved' end
redis.call('HSET', KEYS[1], 'at:' .. ARGV[1], ARGV[4])
return 'healed'
