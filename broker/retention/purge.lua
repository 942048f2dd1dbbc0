#!lua flags=allow-oom
-- PURGE: take a dead letter away with its data, and say so in the log.
-- KEYS  1 dead or refused (stream)  2 blob:<gid> (string)  3 state (hash)  4 control (stream)
-- ARGV  1 its id in the stream  2 what counts it in `state`: 'dead', or '' for a letter of `refused`
--       3 what its gid takes from `ids`  4… the log entry's fields and values
-- reply "purged" | "gone" (it was not there any more)
-- include log_event
-- include refused
local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then return 'gone' end
if ARGV[2] == '' then
  forget_letter(KEYS[1], letter)
else
  redis.call('XDEL', KEYS[1], ARGV[1])
  redis.call('UNLINK', KEYS[2])
  redis.call('HINCRBY', KEYS[3], ARGV[2], -1)
  redis.call('HINCRBY', KEYS[3], 'purged', 1)
  redis.pcall('HINCRBY', KEYS[3], 'ids', ARGV[3])
end
log_event(KEYS[4], unpack(ARGV, 4))
return 'purged'
