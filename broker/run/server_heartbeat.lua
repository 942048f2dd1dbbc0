#!lua flags=allow-oom
-- SERVER_HEARTBEAT: an inference server's heartbeat; and which versions were served of late, for the bounds of what was generated meanwhile.
-- KEYS  1 pools (hash: server -> status)  2 served (sorted set: version -> when it was served last, milliseconds of Redis's clock)
-- ARGV  1 server  2 status (JSON)  3 version served now, -1 for none  4 milliseconds to remember one that is served no more
-- reply 1
-- The version that the server had in its last report was served until now.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known, before = pcall(cjson.decode, redis.call('HGET', KEYS[1], ARGV[1]) or '')
local served = {ARGV[3]}
if known and type(before) == 'table' and tonumber(before.version) then served[2] = string.format('%.0f', before.version) end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
for _, version in ipairs(served) do
  if tonumber(version) >= 0 then redis.call('ZADD', KEYS[2], string.format('%.0f', now), version) end
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - ARGV[4]))
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
