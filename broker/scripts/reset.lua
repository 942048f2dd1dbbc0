#!lua flags=allow-oom
-- RESET: forget a run's queue, batches, ledgers, registrations and counters.
-- KEYS  1… every key to delete; blobs of queued and batched groups among them
-- reply number of keys deleted
return redis.call('UNLINK', unpack(KEYS))
