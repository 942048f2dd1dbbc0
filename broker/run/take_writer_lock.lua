#!lua flags=allow-oom
-- TAKE_WRITER_LOCK: take a lock that nobody holds, even when Redis is full: a trainer that can't
-- would never free memory.
-- KEYS  1 writer:<policy> (string)  2 state (hash)
-- ARGV  1 token  2 milliseconds to hold it
--       3 the lock's field in `state`, which says who took it last
-- reply 1 if it is ours now, or was before, else 0
local writer, state = unpack(KEYS)
local token, hold_ms, taken_by = unpack(ARGV)
local holder = redis.call('GET', writer)
if holder then return holder == token and 1 or 0 end
redis.call('SET', writer, token, 'PX', hold_ms)
redis.call('HSET', state, taken_by, token)
return 1
