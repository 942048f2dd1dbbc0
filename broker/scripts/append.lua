#!lua flags=allow-oom
-- APPEND: add an entry to a log, once, even when Redis is full: what frees memory writes to it on its way.
-- KEYS  1 any stream that is a log  2 once:<nonce> (string)
-- ARGV  1 seconds to remember the nonce  2 entries to keep, approximately  3… the entry's fields and values
-- reply "added" | "already"
if not redis.call('SET', KEYS[2], '1', 'NX', 'EX', ARGV[1]) then return 'already' end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
return 'added'
