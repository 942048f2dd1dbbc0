#!lua flags=allow-oom
-- TAKE_UPDATE_SLOT: let a server update now, or go on updating, unless enough others of its pool
-- do. What a killed agent holds lapses.
-- KEYS  1 updating:<pool> (sorted set: server → when its turn lapses, milliseconds of Redis's
--       clock)
-- ARGV  1 server  2 how many may update at once
--       3 milliseconds that the turn lasts unless it is taken again
-- reply 1 if it is the server's turn, else 0
--- @include now
local updating = KEYS[1]
local server, most, turn_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
redis.call('ZREMRANGEBYSCORE', updating, '-inf', now)
local has_turn = redis.call('ZSCORE', updating, server)
if not has_turn and redis.call('ZCARD', updating) >= most then return 0 end
redis.call('ZADD', updating, now + turn_ms, server)
redis.call('PEXPIRE', updating, turn_ms)
return 1
