#!lua flags=allow-oom
-- APPEND: add an entry to a stream that is a log, even when Redis is full: what frees memory writes to it on its way.
-- KEYS  1 any stream
-- ARGV  1 id ('*': the next)  2 entries to keep, approximately (0: all)  3… fields and values
-- reply id; the error of XADD where the id is not above the newest one's
if ARGV[2] ~= '0' then return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], ARGV[1], unpack(ARGV, 3)) end
return redis.call('XADD', KEYS[1], ARGV[1], unpack(ARGV, 3))
