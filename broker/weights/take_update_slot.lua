#!lua flags=allow-oom
-- TAKE_UPDATE_SLOT: let a server update now, or go on updating, unless enough others of its pool do. What a killed agent holds lapses.
-- KEYS  1 updating:<pool> (sorted set: server → when its turn lapses, milliseconds of Redis's clock)
-- ARGV  1 server  2 how many may update at once  3 milliseconds that the turn lasts unless it is taken again
-- reply 1 if it is the server's turn, else 0
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[3]), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
