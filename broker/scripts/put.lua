#!lua
-- PUT: make a stored blob part of the queue, once, if there is room for it.
-- KEYS  1 groups (stream)  2 blob:<gid> (string)  3 seen:<post> (string)  4 state (hash)  5 trainers (hash)
--       6 pools (hash)  7 lineage (hash)  8 lineage:old (hash): only read where ARGV 11 says so, as is weights:<policy>, which is no
--       KEY, since who puts groups may not write to it
--       9 trained (hash)
-- ARGV  1 seconds for which the post is remembered (0: while its group is unfinished)  2 a word of this call's own
--       3 digest of the body, where another body may come under the same id; else ''  4 post: the gid, unless that says otherwise
--       5 bytes and 6 sequences that may be queued  7 bytes and 8 sequences of one environment (each 0: no limit)
--       9 steps that a group may be late, 0 for any, '' to leave it as it is  10 policy whose steps they are
--       11 1 if the sender has not asked, but believes that there are no servers and no lineages, and that the trainer's
--       registration and the newest version's entry id are 12 and 13 ('' for none)
--       14 env  15 n  16 bytes  17… the entry's fields and values, gid first
-- reply "stored" (now, or by a call whose reply was lost) | "duplicate" (the post was stored of late)
--       | "conflict" (with another body) | "unfinished" (its group is still somewhere, however old)
--       | "trained <gid>" (its group is still kept, but trained: the next one is to have this gid)
--       | "noblob" (it expired: set it again) | "changed" (the sender believes what is not so)
--       | "late" (it would be trained too late) | "full" | "env_full" (over a quota of the queue, of its environment)
-- The blob arrives with a TTL, so that a crash before this script leaves nothing behind; here it loses it. So a blob
-- without one is that of a group which was accepted and is not freed.
-- Where so many environments have groups queued that each /status-env would take long, those of one more count as nobody's (-).
-- What waits alone always fits. The newest max_lag is kept for FORM's sake: every former knows it, whoever it is.
local max_lag, env, n, bytes = ARGV[9], ARGV[14], tonumber(ARGV[15]), tonumber(ARGV[16])
local memory = ARGV[2] .. ' ' .. ARGV[3]
local seen, known = redis.call('GET', KEYS[3]), nil
if seen == memory then return 'stored' end
if seen then
  local digest = string.match(seen, ' (.+)$')
  if digest and ARGV[3] ~= '' and digest ~= ARGV[3] then return 'conflict' end
  known = 'duplicate'
else
  local ttl = redis.call('PTTL', KEYS[2])
  if ttl == -2 then return 'noblob' end
  if ttl == -1 then
    local step, last, gid = redis.call('HGET', KEYS[9], ARGV[4]), 0, ARGV[4]
    while step and tonumber(step) > last do -- from each group of the post that is kept to the one that came after it
      gid, last = ARGV[4] .. '~' .. step, tonumber(step)
      step = redis.call('HGET', KEYS[9], gid)
    end
    if step then gid = gid .. '~' .. ARGV[2] end -- the ids of a replay, of other steps
    if gid ~= ARGV[18] then return 'trained ' .. gid end
    known = 'unfinished'
  end
end
if known then
  local counted = 'duplicates:' .. env
  if redis.call('HEXISTS', KEYS[4], counted) == 0 and redis.call('HLEN', KEYS[4]) > 5000 then counted = 'duplicates:-' end
  redis.call('HINCRBY', KEYS[4], counted, 1)
  return known
end
if ARGV[11] == '1' then
  local weights = string.gsub(KEYS[1], 'groups$', 'weights:') .. ARGV[10]
  local newest = redis.call('XREVRANGE', weights, '+', '-', 'COUNT', '1')[1]
  if redis.call('EXISTS', KEYS[6], KEYS[7], KEYS[8]) > 0 or (redis.call('HGET', KEYS[5], 'config') or '') ~= ARGV[12]
      or (newest and newest[1] or '') ~= ARGV[13] then
    return 'changed'
  end
end
if redis.call('HEXISTS', KEYS[4], 'env_sequences:' .. env) == 0 and redis.call('HLEN', KEYS[4]) > 5000 then -- invented ids
  env = '-'
  for i = 17, #ARGV, 2 do
    if ARGV[i] == 'env' then ARGV[i + 1] = env end
  end
end
local function counter(name) return tonumber(redis.call('HGET', KEYS[4], name) or '0') end
local function over(name, added, limit)
  local held = counter(name)
  return limit > 0 and held > 0 and held + added > limit
end

local config = max_lag ~= '' and max_lag ~= '0' and redis.call('HGET', KEYS[5], 'config')
local readable, known = pcall(cjson.decode, config or '')
local batch_size = readable and type(known) == 'table' and tonumber(known.batch_size)
if batch_size then
  local waiting = counter('sequences') + (counter('formed') - counter('delivered')) * batch_size
  if waiting >= max_lag * batch_size then return 'late' end
end
if over('bytes', bytes, tonumber(ARGV[5])) or over('sequences', n, tonumber(ARGV[6])) then return 'full' end
if over('env_bytes:' .. env, bytes, tonumber(ARGV[7])) or over('env_sequences:' .. env, n, tonumber(ARGV[8])) then
  return 'env_full'
end

if ARGV[1] ~= '0' then redis.call('SET', KEYS[3], memory, 'EX', ARGV[1]) end
redis.call('PERSIST', KEYS[2])
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 17))
redis.call('HINCRBY', KEYS[4], 'accepted', 1)
redis.call('HINCRBY', KEYS[4], 'groups', 1)
redis.call('HINCRBY', KEYS[4], 'sequences', n)
redis.call('HINCRBY', KEYS[4], 'bytes', ARGV[16])
redis.call('HINCRBY', KEYS[4], 'env_sequences:' .. env, n)
redis.call('HINCRBY', KEYS[4], 'env_bytes:' .. env, ARGV[16])
redis.call('HINCRBY', KEYS[4], 'waiting:' .. env .. ':' .. n, 1)
if max_lag ~= '' then redis.call('HSET', KEYS[4], 'max_lag', max_lag, 'lag_of', ARGV[10]) end
return 'stored'
