#!lua flags=allow-oom
-- RETIRE: every policy has trained this batch and its checkpoint covers it: free it.
-- KEYS  1 batches (stream)  2… blob:<gid> of its groups (strings)
-- ARGV  1 step
-- reply number of blobs freed
redis.call('XDEL', KEYS[1], ARGV[1] .. '-0')
return redis.call('UNLINK', unpack(KEYS, 2))
