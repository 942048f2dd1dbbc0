#!lua flags=allow-oom
-- TAKE_WRITER_LOCK: take a lock that nobody holds, even when Redis is full: a trainer that can't would never free memory.
-- KEYS  1 writer:<policy> (string)  2 state (hash)
-- ARGV  1 token  2 milliseconds to hold it  3 the lock's field in `state`, which says who took it last
-- reply 1 if it is ours now, or was before, else 0
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if not holder then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[1])
end
return 1
