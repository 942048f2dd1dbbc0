#!lua flags=allow-oom
-- ACQUIRE: take a lock that nobody holds, even when Redis is full: a trainer that can't would never free memory.
-- KEYS  1 writer:<policy> (string)
-- ARGV  1 token  2 milliseconds to hold it
-- reply 1 if it is ours now, or was before, else 0
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0
