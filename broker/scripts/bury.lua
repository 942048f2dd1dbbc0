#!lua
-- BURY: keep a refused post for whoever wants to know why, once.
-- KEYS  1 refused (stream)  2 blob:refused-<gid> (string)
-- ARGV  1 the body  2 seconds to keep it  3 entries to keep, approximately  4… the entry's fields and values
-- reply 1 | 0 (it is kept already)
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*', unpack(ARGV, 4))
return 1
