#!lua flags=allow-oom
-- PURGE: take a dead letter away with its data, and say so in the log.
-- KEYS  1 dead or refused (stream)  2 blob:<gid> (string)  3 state (hash)  4 control (stream)
-- ARGV  1 its id in the stream
--       2 what counts it in `state`: 'dead', or '' for a letter of `refused`
--       3 what its gid takes from `ids`  4… the log entry's fields and values
-- reply "purged" | "gone" (it was not there any more)
--- @include log_event
--- @include refused
local stream, blob, state, control = unpack(KEYS)
local id, counter, id_number = unpack(ARGV, 1, 3)
local EVENT = 4
local letter = redis.call('XRANGE', stream, id, id)[1]
if not letter then return 'gone' end

if counter == '' then
  forget_letter(stream, letter)
else
  redis.call('XDEL', stream, id)
  redis.call('UNLINK', blob)
  redis.call('HINCRBY', state, counter, -1)
  redis.call('HINCRBY', state, 'purged', 1)
  redis.pcall('HINCRBY', state, 'ids', id_number)
end
log_event(control, unpack(ARGV, EVENT))
return 'purged'
