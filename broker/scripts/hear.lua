#!lua flags=allow-oom
-- HEAR: an environment called.
-- KEYS  1 envs (hash: <id> -> record)  2 heard (sorted set: id -> milliseconds of Redis's clock)
-- ARGV  1 id
-- reply its record | nil (it is not registered)
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record then return nil end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), ARGV[1])
return record
