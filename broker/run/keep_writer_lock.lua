#!lua flags=allow-oom
-- KEEP_WRITER_LOCK: go on holding a lock, also one that has lapsed, if nobody has held it since.
-- KEYS  1 writer:<policy> (string)  2 state (hash)
-- ARGV  1 token  2 milliseconds to hold it  3 the lock's field in `state`
-- reply 1 | 0 (another has it, or had it)
-- While Redis refuses writes nobody can keep a lock, and nobody can take one.
local writer, state = unpack(KEYS)
local token, hold_ms, taken_by = unpack(ARGV)
local holder = redis.call('GET', writer)
if holder and holder ~= token then return 0 end
if not holder and redis.call('HGET', state, taken_by) ~= token then return 0 end
redis.call('SET', writer, token, 'PX', hold_ms)
return 1
