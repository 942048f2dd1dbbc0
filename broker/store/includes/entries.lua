-- Fields and values in a row, as Redis replies them, as a table.
local function map(flat)
  local fields = {}
  for i = 1, #flat, 2 do fields[flat[i]] = flat[i + 1] end
  return fields
end

-- One of them; nil where there is none.
local function value_of(flat, field)
  for i = 1, #flat, 2 do
    if flat[i] == field then return flat[i + 1] end
  end
end

-- The step in the id of an entry of `batches` or a ledger.
local function step_of(id) return tonumber(string.match(id, '^%d+')) end

-- The ids in a field `gids`, one by one.
local function each_gid(gids) return string.gmatch(gids or '', '%S+') end
