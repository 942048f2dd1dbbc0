#!lua flags=allow-oom
-- SERVER_HEARTBEAT: an inference server's heartbeat; and which versions were served of late, for
-- the bounds of what was generated meanwhile.
-- KEYS  1 pools (hash: server -> status)
--       2 served (sorted set: version -> when it was served last, milliseconds of Redis's clock)
-- ARGV  1 server  2 status (JSON)  3 version served now, -1 for none
--       4 milliseconds to remember one that is served no more
-- reply 1
-- The version that the server had in its last report was served until now.
--- @include now
local pools, served = unpack(KEYS)
local server, status, version, remembered_ms = unpack(ARGV)
local now = now_ms()

local function note(number)
  if tonumber(number) >= 0 then redis.call('ZADD', served, whole(now), number) end
end

local readable, before = pcall(cjson.decode, redis.call('HGET', pools, server) or '')
redis.call('HSET', pools, server, status)
note(version)
if readable and type(before) == 'table' and tonumber(before.version) then
  note(whole(before.version))
end
redis.call('ZREMRANGEBYSCORE', served, '-inf', whole(now - remembered_ms))
redis.call('PEXPIRE', served, remembered_ms)
return 1
