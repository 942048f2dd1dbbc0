#!lua flags=allow-oom
-- REGISTER_ENV: give an environment the next id; the same nonce gets the same id again, for some
-- minutes.
-- KEYS  1 envs (hash: <id> -> record, count -> n, name:<name> -> number of that name,
--       named:<name> -> records of that name, life -> when the first one came)
--       2 heard (sorted set: id -> milliseconds of Redis's clock)  3 once:<nonce> (string)
-- ARGV  1 seconds to remember the nonce  2 desired name
--       3 the record as JSON, in front of it env_id -1 and an empty name
--       4 environments that may be known  5 milliseconds after which a silent one is forgotten
--       6 milliseconds after which the longest silent one is, where there is no room
-- reply id, or -1: there is no room. The record stays text: cjson would round its numbers to 14
--       digits
--- @include now
local envs, heard, once = unpack(KEYS)
local remembered_s, desired_name, record = unpack(ARGV, 1, 3)
local most, silent_ms, crowded_ms = tonumber(ARGV[4]), ARGV[5], ARGV[6]
local BLANK = '^{"env_id":%-1,"name":"",'
local time, now = redis.call('TIME'), now_ms()

local function name_of(id)
  local readable, known = pcall(cjson.decode, redis.call('HGET', envs, id) or '')
  if not readable or type(known) ~= 'table' or type(known.config) ~= 'table' then return 'nil' end
  return tostring(known.config.desired_name)
end

-- Forget the longest silent ones, those that were silent for so long, at most so many.
local function forget(silent, count)
  local before = whole(now - silent)
  local ids = redis.call('ZRANGE', heard, '-inf', before, 'BYSCORE', 'LIMIT', '0', count)
  for _, id in ipairs(ids) do
    local name = name_of(id)
    if redis.call('HINCRBY', envs, 'named:' .. name, -1) <= 0 then
      redis.call('HDEL', envs, 'named:' .. name, 'name:' .. name)
    end
    redis.call('HDEL', envs, id)
    redis.call('ZREM', heard, id)
  end
end

local function is_crowded() return redis.call('ZCARD', heard) >= most end

local known, life = string.match(redis.call('GET', once) or '', '^(%d+) (.*)$')
-- it was not reset since
if known and life == redis.call('HGET', envs, 'life') then return tonumber(known) end
if not string.find(record, BLANK) then
  return redis.error_reply('ERR the record does not begin with a blank id and name')
end
forget(silent_ms, '100')
if is_crowded() then forget(crowded_ms, '1') end
if is_crowded() then return -1 end

-- The counter's value before it grew; `otherwise` where it was spoilt by hand.
local function next_of(field, otherwise)
  local reply = redis.pcall('HINCRBY', envs, field, 1)
  if type(reply) == 'number' then return reply - 1 end
  redis.call('HSET', envs, field, otherwise + 1)
  return otherwise
end

local free = 0
for _, field in ipairs(redis.call('HKEYS', envs)) do
  if string.find(field, '^%d+$') then free = math.max(free, field + 1) end
end
local id = next_of('count', free)
local k = next_of('name:' .. desired_name, id)
next_of('named:' .. desired_name, 0)
local name = cjson.encode(desired_name .. '_' .. k)
local front = '{"env_id":' .. id .. ',"name":' .. name .. ','
redis.call('HSET', envs, id, (string.gsub(record, BLANK, function() return front end)))
redis.call('HSETNX', envs, 'life', time[1] .. '.' .. time[2])
redis.call('ZADD', heard, whole(now), id)
redis.call('SET', once, id .. ' ' .. redis.call('HGET', envs, 'life'), 'EX', remembered_s)
return id
