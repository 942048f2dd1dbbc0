#!lua flags=allow-oom
-- TOUCH_ENV: an environment called.
-- KEYS  1 envs (hash: <id> -> record)  2 heard (sorted set: id -> milliseconds of Redis's clock)
-- ARGV  1 id
--       2 name of the token that calls, if that may call for its own environments only; else ''
-- reply its record | nil (it is not registered). Of another token's nothing is noted
--- @include now
local envs, heard = unpack(KEYS)
local id, token = unpack(ARGV)
local record = redis.call('HGET', envs, id)
if not record then return nil end
if token ~= '' then
  local readable, known = pcall(cjson.decode, record)
  local owner = readable and type(known) == 'table' and known.owner or ''
  if owner ~= '' and owner ~= token then return record end
end
redis.call('ZADD', heard, whole(now_ms()), id)
return record
