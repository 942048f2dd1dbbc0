#!lua flags=allow-oom
-- KEEP_WRITER_LOCK: go on holding a lock, also one that has lapsed, if nobody has held it since.
-- KEYS  1 writer:<policy> (string)  2 state (hash)
-- ARGV  1 token  2 milliseconds to hold it  3 the lock's field in `state`
-- reply 1 | 0 (another has it, or had it)
-- While Redis refuses writes nobody can keep a lock, and nobody can take one.
local holder = redis.call('GET', KEYS[1])
if holder ~= ARGV[1] and (holder or redis.call('HGET', KEYS[2], ARGV[3]) ~= ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
