#!lua flags=allow-oom
-- REGISTER_ENV: give an environment the next id; the same nonce gets the same id again.
-- KEYS  1 envs (hash: <id> -> record, nonce:<nonce> -> id, count -> n, name:<name> -> number of that name)
-- ARGV  1 nonce  2 desired name  3 the record as JSON with env_id and name left as the words @id and @name
-- reply id
local known = redis.call('HGET', KEYS[1], 'nonce:' .. ARGV[1])
if known then return tonumber(known) end
local id = redis.call('HINCRBY', KEYS[1], 'count', 1) - 1
local k = redis.call('HINCRBY', KEYS[1], 'name:' .. ARGV[2], 1) - 1
local record = cjson.decode(ARGV[3])
record.env_id = id
record.name = ARGV[2] .. '_' .. k
redis.call('HSET', KEYS[1], id, cjson.encode(record), 'nonce:' .. ARGV[1], id)
return id
