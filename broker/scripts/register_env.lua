#!lua flags=allow-oom
-- REGISTER_ENV: give an environment the next id; the same nonce gets the same id again.
-- KEYS  1 envs (hash: <id> -> record, nonce:<nonce> -> id, count -> n, name:<name> -> number of that name)
-- ARGV  1 nonce  2 desired name  3 the record as JSON, in front of it env_id -1 and an empty name
-- reply id. The record stays text: cjson would round its numbers to 14 digits
local known = redis.call('HGET', KEYS[1], 'nonce:' .. ARGV[1])
if known then return tonumber(known) end
local blank = '^{"env_id":%-1,"name":"",'
if not string.find(ARGV[3], blank) then return redis.error_reply('ERR the record does not begin with a blank id and name') end
local id = redis.call('HINCRBY', KEYS[1], 'count', 1) - 1
local k = redis.call('HINCRBY', KEYS[1], 'name:' .. ARGV[2], 1) - 1
local front = '{"env_id":' .. id .. ',"name":' .. cjson.encode(ARGV[2] .. '_' .. k) .. ','
local record = string.gsub(ARGV[3], blank, function() return front end)
redis.call('HSET', KEYS[1], id, record, 'nonce:' .. ARGV[1], id)
return id
