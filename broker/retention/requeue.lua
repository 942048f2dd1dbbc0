#!lua flags=allow-oom
-- REQUEUE: put a dead letter back at the end of the queue.
-- KEYS  1 dead (stream)  2 groups (stream)  3 blob:<gid> (string)  4 state (hash)
-- ARGV  1 its id in `dead`  2 env  3 n  4 bytes  5… the queue entry's fields and values, read from the blob
-- reply "requeued" | "gone" (it is no dead letter any more) | "noblob"
if #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then return 'gone' end
if redis.call('EXISTS', KEYS[3]) == 0 then return 'noblob' end
local env, n, bytes = ARGV[2], ARGV[3], ARGV[4]

redis.call('XADD', KEYS[2], '*', unpack(ARGV, 5))
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[4], 'dead', -1)
redis.call('HINCRBY', KEYS[4], 'groups', 1)
redis.call('HINCRBY', KEYS[4], 'sequences', n)
redis.call('HINCRBY', KEYS[4], 'bytes', bytes)
redis.call('HINCRBY', KEYS[4], 'waiting:' .. env .. ':' .. n, 1)
redis.call('HINCRBY', KEYS[4], 'env_sequences:' .. env, n)
redis.call('HINCRBY', KEYS[4], 'env_bytes:' .. env, bytes)
return 'requeued'
