#!lua flags=allow-oom
-- SET_POOL_RULE: make this the pool's rule, if the one that was judged is still the rule.
-- KEYS  1 rule:<pool> (stream)
-- ARGV  1 id of the rule judged ('0-0': there was none)  2 how many rules to keep, about
--       3… the rule's fields and values
-- reply id of the rule, which may be in force since the script was first sent
--       | nil (another was made: judge again)
local rules = KEYS[1]
local judged, kept = unpack(ARGV, 1, 2)
local RULE = 3
local newest = redis.call('XREVRANGE', rules, '+', '-', 'COUNT', 1)[1]
if newest and newest[1] ~= judged then
  for i = RULE, #ARGV do
    if newest[2][i - RULE + 1] ~= ARGV[i] then return nil end
  end
  return newest[1]
end
return redis.call('XADD', rules, 'MAXLEN', '~', kept, '*', unpack(ARGV, RULE))
