#!lua flags=allow-oom
-- TOUCH_ENV: an environment called.
-- KEYS  1 envs (hash: <id> -> record)  2 heard (sorted set: id -> milliseconds of Redis's clock)
-- ARGV  1 id  2 name of the token that calls, if that may call for its own environments only; else ''
-- reply its record | nil (it is not registered). Of another token's nothing is noted
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record then return nil end
if ARGV[2] ~= '' then
  local readable, known = pcall(cjson.decode, record)
  local owner = readable and type(known) == 'table' and known.owner or ''
  if owner ~= '' and owner ~= ARGV[2] then return record end
end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), ARGV[1])
return record
