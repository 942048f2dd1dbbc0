#!lua
-- PUT: make a stored blob part of the queue, once, if there is room for it.
-- KEYS  1 groups (stream)  2 blob:<gid> (string)  3 seen:<post> (string)  4 state (hash)
--       5 trainers (hash)  6 pools (hash)  7 lineage (hash)  8 lineage:old (hash): only read where
--       ARGV 11 says so, as is weights:<policy>, which is no KEY, since who puts groups may not
--       write to it
--       9 trained (hash)
-- ARGV  1 seconds for which the post is remembered (0: while its group is unfinished)
--       2 a word of this call's own
--       3 digest of the body, where another body may come under the same id; else ''
--       4 post: the gid, unless that says otherwise
--       5 bytes and 6 sequences that may be queued  7 bytes and 8 sequences of one environment
--       (each 0: no limit)
--       9 steps that a group may be late, 0 for any, '' to leave it as it is
--       10 policy whose steps they are
--       11 1 if the sender has not asked, but believes that there are no servers and no lineages,
--       and that the trainer's registration and the newest version's entry id are 12 and 13
--       ('' for none)
--       14 env  15 n  16 bytes  17 what its gid adds to `ids`
--       18… the entry's fields and values, gid first
-- reply "stored" (now, or by a call whose reply was lost)
--       | "duplicate" (the post was stored of late) | "conflict" (with another body)
--       | "unfinished" (its group is still somewhere, however old)
--       | "trained <gid>" (its group is still kept, but trained: the next one is to have this gid)
--       | "noblob" (it expired: set it again) | "changed" (the sender believes what is not so)
--       | "late" (it would be trained too late)
--       | "full" | "env_full" (over a quota of the queue, of its environment)
-- The blob arrives with a TTL, so that a crash before this script leaves nothing behind; here it
-- loses it. So a blob without one is that of a group which was accepted and is not freed.
-- Where so many environments have groups queued that each /status-env would take long, those of
-- one more count as nobody's (-).
-- What waits alone always fits. The newest max_lag is kept for FORM's sake: every former knows it,
-- whoever it is.
--- @include counters
local groups, blob, seen, state, trainers, pools, lineage, old_lineage, trained = unpack(KEYS)
local remembered_s, call, digest, post = unpack(ARGV, 1, 4)
local most_bytes, most_sequences, most_env_bytes, most_env_sequences = unpack(ARGV, 5, 8)
local max_lag, policy = unpack(ARGV, 9, 10)
local believes, registration, newest_version = unpack(ARGV, 11, 13)
local env, n, bytes, id_number = unpack(ARGV, 14, 17)
local ENTRY, gid = 18, ARGV[19]
local mark = call .. ' ' .. digest

-- The gid for a post whose groups so far are kept, and trained; nil where one of them is not.
local function next_gid()
  local step, last, newest = redis.call('HGET', trained, post), 0, post
  while step and tonumber(step) > last do -- from each group of the post to the one after it
    newest, last = post .. '~' .. step, tonumber(step)
    step = redis.call('HGET', trained, newest)
  end
  if step then newest = newest .. '~' .. call end -- the ids of a replay, of other steps
  if newest ~= gid then return newest end
end

-- The reply where the post is known, or its blob is not there; nil where it is new.
local function judge()
  local known = redis.call('GET', seen)
  if known == mark then return 'stored' end
  if known then
    local other = string.match(known, ' (.+)$')
    if other and digest ~= '' and other ~= digest then return 'conflict' end
    return 'duplicate'
  end
  local ttl = redis.call('PTTL', blob)
  if ttl == -2 then return 'noblob' end
  if ttl ~= -1 then return nil end
  local newer = next_gid()
  return newer and 'trained ' .. newer or 'unfinished'
end

local function count_duplicate()
  local counter = 'duplicates:' .. env
  local is_new = redis.call('HEXISTS', state, counter) == 0
  if is_new and redis.call('HLEN', state) > 5000 then counter = 'duplicates:-' end
  redis.call('HINCRBY', state, counter, 1)
end

local function is_as_believed()
  local weights = string.gsub(groups, 'groups$', 'weights:') .. policy
  local newest = redis.call('XREVRANGE', weights, '+', '-', 'COUNT', '1')[1]
  return redis.call('EXISTS', pools, lineage, old_lineage) == 0
    and (redis.call('HGET', trainers, 'config') or '') == registration
    and (newest and newest[1] or '') == newest_version
end

local function counter(name) return tonumber(redis.call('HGET', state, name) or '0') end

local function is_late()
  if max_lag == '' or max_lag == '0' then return false end
  local readable, config = pcall(cjson.decode, redis.call('HGET', trainers, 'config') or '')
  local batch_size = readable and type(config) == 'table' and tonumber(config.batch_size)
  if not batch_size then return false end
  local undelivered = counter('formed') - counter('delivered')
  return counter('sequences') + undelivered * batch_size >= max_lag * batch_size
end

local function is_over(name, added, limit)
  local held = counter(name)
  return tonumber(limit) > 0 and held > 0 and held + added > tonumber(limit)
end

local known = judge()
if known == 'duplicate' or known == 'unfinished' then count_duplicate() end
if known then return known end
if believes == '1' and not is_as_believed() then return 'changed' end
local is_new = redis.call('HEXISTS', state, 'env_sequences:' .. env) == 0
if is_new and redis.call('HLEN', state) > 5000 then -- its id may be invented
  env = '-'
  for i = ENTRY, #ARGV, 2 do
    if ARGV[i] == 'env' then ARGV[i + 1] = env end
  end
end
if is_late() then return 'late' end
if is_over('bytes', bytes, most_bytes) or is_over('sequences', n, most_sequences) then
  return 'full'
end
if is_over('env_bytes:' .. env, bytes, most_env_bytes)
    or is_over('env_sequences:' .. env, n, most_env_sequences) then
  return 'env_full'
end

if remembered_s ~= '0' then redis.call('SET', seen, mark, 'EX', remembered_s) end
redis.call('PERSIST', blob)
redis.call('XADD', groups, '*', unpack(ARGV, ENTRY))
redis.call('HINCRBY', state, 'accepted', 1)
-- an audit's only: nothing is refused where it is full
redis.pcall('HINCRBY', state, 'ids', id_number)
add_to_queue(state, env, n, bytes)
if max_lag ~= '' then redis.call('HSET', state, 'max_lag', max_lag, 'lag_of', policy) end
return 'stored'
