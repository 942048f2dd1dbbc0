#!lua flags=allow-oom
-- APPEND_CAPPED: add an entry to a log, once, even when Redis is full: what frees memory writes to
-- it on its way.
-- KEYS  1 once:<nonce> (string)
-- ARGV  1 the key of any stream that is a log: among KEYS it would have to be readable, and some
--       may only write to it
--       2 seconds to remember the nonce  3 entries to keep, approximately
--       4… the entry's fields and values
-- reply "added" | "already"
local once = KEYS[1]
local log, remembered_s, kept = unpack(ARGV, 1, 3)
local ENTRY = 4
if not redis.call('SET', once, '1', 'NX', 'EX', remembered_s) then return 'already' end
redis.call('XADD', log, 'MAXLEN', '~', kept, '*', unpack(ARGV, ENTRY))
return 'added'
