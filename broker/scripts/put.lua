#!lua
-- PUT: make a stored blob part of the queue, once.
-- KEYS  1 groups (stream)  2 blob:<gid> (string)  3 seen:<gid> (string)  4 state (hash)
-- ARGV  1 seconds to remember the gid  2 byte quota of the queue, 0 for none  3 env  4 n  5 bytes  6… the entry's fields and values
-- reply "stored" | "duplicate" | "full" | "noblob" (it expired: set it again)
-- The blob arrives with a TTL, so that a crash before this script leaves nothing behind; here it loses it.
if redis.call('EXISTS', KEYS[3]) == 1 then return 'duplicate' end
if redis.call('EXISTS', KEYS[2]) == 0 then return 'noblob' end
local env, n, bytes = ARGV[3], ARGV[4], tonumber(ARGV[5])
local quota = tonumber(ARGV[2])
local queued = tonumber(redis.call('HGET', KEYS[4], 'bytes') or '0')
if quota > 0 and queued > 0 and queued + bytes > quota then return 'full' end

redis.call('SET', KEYS[3], '1', 'EX', ARGV[1])
redis.call('PERSIST', KEYS[2])
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 6))
redis.call('HINCRBY', KEYS[4], 'accepted', 1)
redis.call('HINCRBY', KEYS[4], 'groups', 1)
redis.call('HINCRBY', KEYS[4], 'sequences', n)
redis.call('HINCRBY', KEYS[4], 'bytes', bytes)
redis.call('HINCRBY', KEYS[4], 'size:' .. n, 1)
redis.call('HINCRBY', KEYS[4], 'env_groups:' .. env, 1)
redis.call('HINCRBY', KEYS[4], 'env_sequences:' .. env, n)
return 'stored'
