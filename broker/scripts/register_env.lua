#!lua flags=allow-oom
-- REGISTER_ENV: give an environment the next id; the same nonce gets the same id again, for some minutes.
-- KEYS  1 envs (hash: <id> -> record, count -> n, name:<name> -> number of that name, named:<name> -> records of that name,
--       life -> when the first one came)
--       2 heard (sorted set: id -> milliseconds of Redis's clock)  3 once:<nonce> (string)
-- ARGV  1 seconds to remember the nonce  2 desired name  3 the record as JSON, in front of it env_id -1 and an empty name
--       4 environments that may be known  5 milliseconds after which a silent one is forgotten
--       6 milliseconds after which the longest silent one is, where there is no room
-- reply id, or -1: there is no room. The record stays text: cjson would round its numbers to 14 digits
local known, life = string.match(redis.call('GET', KEYS[3]) or '', '^(%d+) (.*)$')
if known and life == redis.call('HGET', KEYS[1], 'life') then return tonumber(known) end -- it was not reset since
local blank = '^{"env_id":%-1,"name":"",'
if not string.find(ARGV[3], blank) then return redis.error_reply('ERR the record does not begin with a blank id and name') end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function forget(silent, most)  -- those that were silent for so long
  local before = string.format('%.0f', now - silent)
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', before, 'BYSCORE', 'LIMIT', '0', most)) do
    local readable, record = pcall(cjson.decode, redis.call('HGET', KEYS[1], id) or '')
    local config = readable and type(record) == 'table' and type(record.config) == 'table' and record.config or {}
    local name = tostring(config.desired_name)
    if redis.call('HINCRBY', KEYS[1], 'named:' .. name, -1) <= 0 then
      redis.call('HDEL', KEYS[1], 'named:' .. name, 'name:' .. name)
    end
    redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
  end
end
forget(ARGV[5], '100')
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) then forget(ARGV[6], '1') end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[4]) then return -1 end

local function next_of(field, otherwise) -- where what is counted there was spoilt by hand
  local reply = redis.pcall('HINCRBY', KEYS[1], field, 1)
  if type(reply) == 'number' then return reply - 1 end
  redis.call('HSET', KEYS[1], field, otherwise + 1)
  return otherwise
end

local free = 0
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.find(field, '^%d+$') then free = math.max(free, field + 1) end
end
local id = next_of('count', free)
local k = next_of('name:' .. ARGV[2], id)
next_of('named:' .. ARGV[2], 0)
local front = '{"env_id":' .. id .. ',"name":' .. cjson.encode(ARGV[2] .. '_' .. k) .. ','
local record = string.gsub(ARGV[3], blank, function() return front end)
redis.call('HSET', KEYS[1], id, record)
redis.call('HSETNX', KEYS[1], 'life', time[1] .. '.' .. time[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', now), id)
redis.call('SET', KEYS[3], id .. ' ' .. redis.call('HGET', KEYS[1], 'life'), 'EX', ARGV[1])
return id
