#!lua flags=allow-oom
-- REGISTER_ENV: give an environment the next id; the same nonce gets the same id again, for some minutes.
-- KEYS  1 envs (hash: <id> -> record, count -> n, name:<name> -> number of that name, life -> when the first one came)
--       2 heard (sorted set: id -> milliseconds of Redis's clock)  3 once:<nonce> (string)
-- ARGV  1 seconds to remember the nonce  2 desired name  3 the record as JSON, in front of it env_id -1 and an empty name
-- reply id. The record stays text: cjson would round its numbers to 14 digits
local known, life = string.match(redis.call('GET', KEYS[3]) or '', '^(%d+) (.*)$')
if known and life == redis.call('HGET', KEYS[1], 'life') then return tonumber(known) end -- it was not reset since
local blank = '^{"env_id":%-1,"name":"",'
if not string.find(ARGV[3], blank) then return redis.error_reply('ERR the record does not begin with a blank id and name') end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local id = redis.call('HINCRBY', KEYS[1], 'count', 1) - 1
local k = redis.call('HINCRBY', KEYS[1], 'name:' .. ARGV[2], 1) - 1
local front = '{"env_id":' .. id .. ',"name":' .. cjson.encode(ARGV[2] .. '_' .. k) .. ','
local record = string.gsub(ARGV[3], blank, function() return front end)
redis.call('HSET', KEYS[1], id, record)
redis.call('HSETNX', KEYS[1], 'life', time[1] .. '.' .. time[2])
redis.call('ZADD', KEYS[2], now, id)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 86400000)
redis.call('SET', KEYS[3], id .. ' ' .. redis.call('HGET', KEYS[1], 'life'), 'EX', ARGV[1])
return id
