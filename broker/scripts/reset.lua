#!lua flags=allow-oom
-- RESET: forget a run's queue, batches, ledgers, registrations and counters.
-- KEYS  1… every key to delete; blobs of queued and batched groups among them
-- reply number of keys deleted
local deleted = 0
for _, key in ipairs(KEYS) do deleted = deleted + redis.call('UNLINK', key) end
return deleted
