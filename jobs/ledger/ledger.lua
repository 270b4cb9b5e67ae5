-- Every move of the ledger, each atomic, and a script of its own: all above the first move, that move, `return run()`.
-- One script that made all of them anew at each call took 10 of a claim's 40 us. ARGV[1] names the move, the rest are its
-- arguments; the server's clock counts.
-- An image's id is JOB:INDEX. All keys live on one primary (no cluster). Times are seconds since 1970, as text.
--
-- key                     type    meaning                                                          lifetime
-- cf:jobs                 zset    job -> when created                                              pruned with the job
-- cf:open                 set     jobs that are not closed                                         until closed
-- cf:job:JOB              hash    source, destination, recipe, lane, flags, cursor, counts         keep_days after closing
--                                 weight: its share of a queue's room; rate: most images fed a second;
--                                 sample: how many are fed before it is paused for a look, until unpaused
--                                 lister: token of who lists it; who lists on takes it over
-- cf:job:JOB:bits         bits    four bits an image: its state (see STATE)                        as the job
-- cf:job:JOB:unsure       bits    one bit an image: made from what the manifest may not say       as the job
-- cf:job:JOB:parts        hash    manifest part -> {first, last, count}                            as the job
-- cf:job:JOB:rows         list    images of a live job that are in no manifest part yet: {key, etag, size}   as the job
-- cf:job:JOB:failures     hash    index -> {key, code, message, tries, at, worker}; many: S3       as the job
-- cf:job:JOB:again        bits    one bit an image: to be fed once more                            as the job
-- cf:job:JOB:reopened     bits    eight bits an image: how often it was opened again               as the job
--                                 only where the webhook is told of images
-- cf:job:JOB:remarks      hash    index -> {key, review, figures, rules}: the first MAX_REMARKS    as the job
-- cf:job:JOB:tally        hash    of done and skipped images: word -> count (see Remark and Tally)  as the job
-- cf:waiting              zset    image on a queue, unclaimed -> when to look whether it still is  window only
-- cf:leased               zset    image a worker has claimed -> when its lease ends                window only
-- cf:retry                zset    image to be tried again -> when                                  window only
-- cf:entry                hash    image -> queue, newline, message with %TAG%, %QUEUE% to fill in  window only
-- cf:owner                hash    image -> token of its claim, space, output                       while claimed
-- cf:claim                hash    output -> image that may write it                                while claimed
-- cf:published           hash    image -> when its message was published                             window only
-- cf:tries                hash    image -> tries that failed                                       window only
-- cf:vanished             hash    image -> claims whose worker vanished; two: the image is suspect window only
-- cf:computing            set     image that a worker computes alone, with nothing beside it       while claimed
-- cf:died                 hash    image -> workers that died without a word while they did so      window only
-- cf:blamed               hash    image -> the error with which its worker vanished, where known   window only
-- cf:watch:WATCH          hash    swept: when its last complete listing began                      30 days unused
-- cf:watch:WATCH:seen     hash    digest of a key -> ETag of the version that a job got            a day, and while unswept
-- cf:watch:WATCH:when     zset    digest of a key -> when a job got it                             as :seen
-- cf:outbox               zset    receiver (SHA-1 of its URL) -> when it is told next               while it has events
-- cf:outbox:RECEIVER      zset    event (JOB or JOB:INDEX) -> when its webhook is sent next        until sent or given up
-- cf:outbox:tries         hash    event -> deliveries that failed                                  as its event
-- cf:outbox:size          string  how many events there are                                        for ever
-- cf:api:once:DIGEST      string  digest of the body and job of an Idempotency-Key                 a day
-- cf:api:calls:KEY:MINUTE string  calls of an API key in a minute                                  two minutes
-- cf:api:lists:JOB        string  which API process lists it                                       its lease
-- cf:tag                  string  last delivery tag                                                for ever
-- cf:workers              zset    worker -> when it was last heard                                 a day after the last word
-- cf:worker:NODE          hash    what the worker says of itself                                   three heartbeats
-- cf:dispatcher           string  who is the active dispatcher                                     its lock's time
-- cf:room                 string  empty: written to see whether Redis is full                      for ever
-- cf:dispatcher:epoch     string  fencing token: grows with each change of dispatcher              for ever
-- live.M backfill.M suspect.M, unacked*, _kombu.*  belong to Celery; here only LPUSH to the first three

local STATE = {open = 0, done = 1, failed = 2, skipped = 3, cancelled = 4, review = 5}
local MAX_REMARKS = 10000
local RECEIVER_LIMIT, OUTBOX_LIMIT = 20000, 100000  -- events that wait for one (some 2 MB), and for all: none may fill Redis
local SUSPECT_AFTER = 2
local PRUNED = 10
local WATCH_DAYS = 30  -- of one that is not run; later it begins anew, and says so (`Watcher.begin`)
local KEYS_OF_JOB = {'', ':bits', ':unsure', ':parts', ':rows', ':failures', ':again', ':reopened', ':remarks', ':tally'}
local call = redis.call
local clock = call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000

local function at(seconds) return string.format('%.3f', seconds) end

local function split(id)
  local job, index = string.match(id, '^(.+):(%d+)$')
  return job, index
end

local function state_of(job, index)
  return call('BITFIELD', 'cf:job:' .. job .. ':bits', 'GET', 'u4', '#' .. index)[1]
end

local function is_suspect(id)
  return tonumber(call('HGET', 'cf:vanished', id) or 0) >= SUSPECT_AFTER
end

local function publish(id, queue, message)
  local tag = id .. ':' .. call('INCR', 'cf:tag')
  message = string.gsub(message, '%%TAG%%', tag, 1)
  call('HSET', 'cf:published', id, at(now))
  call('LPUSH', queue, (string.gsub(message, '%%QUEUE%%', queue, 1)))
end

local function enter(id, queue, message, lease)
  if call('HSET', 'cf:entry', id, queue .. '\n' .. message) == 1 then
    call('HINCRBY', 'cf:job:' .. split(id), 'window', 1)
  end
  call('ZADD', 'cf:waiting', at(now + lease), id)
  publish(id, queue, message)
end

local function wait_again(id, lease)
  local queue, message = string.match(call('HGET', 'cf:entry', id), '^([^\n]*)\n(.*)$')
  if is_suspect(id) then queue = string.gsub(queue, '^%a+%.', 'suspect.', 1) end
  call('ZADD', 'cf:waiting', at(now + lease), id)
  publish(id, queue, message)
end

-- Live images in the order of their indexes: queue, message, row ...
local function enter_live(job, lease, first, rows)
  for i = 1, #rows, 3 do
    enter(job .. ':' .. string.format('%d', first + (i - 1) / 3), rows[i], rows[i + 1], lease)
    call('RPUSH', 'cf:job:' .. job .. ':rows', rows[i + 2])
  end
  local count = #rows / 3
  for _, name in ipairs({'total', 'cursor', 'unrecorded'}) do call('HINCRBY', 'cf:job:' .. job, name, count) end
end

local function drop_claim(id)
  local owner = call('HGET', 'cf:owner', id)
  if owner then
    local output = string.match(owner, '^%S+ (.*)$')
    if call('HGET', 'cf:claim', output) == id then call('HDEL', 'cf:claim', output) end
    call('HDEL', 'cf:owner', id)
  end
  call('ZREM', 'cf:leased', id)
  call('SREM', 'cf:computing', id)
end

local function leave_window(id)
  drop_claim(id)
  call('ZREM', 'cf:waiting', id)
  call('ZREM', 'cf:retry', id)
  local job = 'cf:job:' .. split(id)
  if call('HDEL', 'cf:entry', id) == 1 and call('EXISTS', job) == 1 then call('HINCRBY', job, 'window', -1) end
  call('HDEL', 'cf:published', id)
  call('HDEL', 'cf:tries', id)
  call('HDEL', 'cf:vanished', id)
  call('HDEL', 'cf:blamed', id)
  call('HDEL', 'cf:died', id)
end

local function settle(job, index, state)
  local key = 'cf:job:' .. job
  if state_of(job, index) ~= STATE.open then return false end
  call('BITFIELD', key .. ':bits', 'SET', 'u4', '#' .. index, state)
  if state == STATE.review then
    call('HINCRBY', key, 'review', 1)
    state = STATE.done
  end
  for name, value in pairs(STATE) do
    if value == state then call('HINCRBY', key, name, 1) end
  end
  return true
end

local function receiver_of(job) return redis.sha1hex(call('HGET', 'cf:job:' .. job, 'webhook') or '') end

local function is_full(receiver)
  if call('ZCARD', 'cf:outbox:' .. receiver) >= RECEIVER_LIMIT then return true end
  return tonumber(call('GET', 'cf:outbox:size') or 0) >= OUTBOX_LIMIT
end

-- The event is due now. False: an image's, beyond the limit; nothing changed.
local function make_due(receiver, event)
  local outbox = 'cf:outbox:' .. receiver
  if split(event) and is_full(receiver) and not call('ZSCORE', outbox, event) then return false end
  call('INCRBY', 'cf:outbox:size', call('ZADD', outbox, at(now), event))
  call('ZADD', 'cf:outbox', 'LT', at(now), receiver)
  call('HDEL', 'cf:outbox:tries', event)
  return true
end

-- An event for the job's webhook, if it has one. Beyond the limit it is only counted; replay makes it again.
local function tell(job, event, flag)
  local key = 'cf:job:' .. job
  if call('HEXISTS', key, flag) == 0 then return end
  if not make_due(receiver_of(job), event) then call('HINCRBY', key, 'untold', 1) end
end

-- When a receiver is told next: behind all that are due now, if it is due itself.
local function await_turn(receiver)
  local due = call('ZRANGE', 'cf:outbox:' .. receiver, 0, 0, 'WITHSCORES')[2]
  if due then
    call('ZADD', 'cf:outbox', at(math.max(tonumber(due), now)), receiver)
  else
    call('ZREM', 'cf:outbox', receiver)
  end
end

local function count_vanished(id)
  local times = call('HINCRBY', 'cf:vanished', id, 1)
  if call('SREM', 'cf:computing', id) == 1 then call('HINCRBY', 'cf:died', id, 1) end
  drop_claim(id)
  return times
end

-- Of a cancelled job: final now. Not to be asked of an image that a worker holds.
local function is_cancelled(id)
  local job, index = split(id)
  if call('HEXISTS', 'cf:job:' .. job, 'cancelled_at') == 0 then return false end
  settle(job, index, STATE.cancelled)
  leave_window(id)
  return true
end

local function holds(id, token)
  local owner = call('HGET', 'cf:owner', id)
  return owner and string.match(owner, '^(%S+) ') == token
end

-- What they say of themselves: {node, {name, value ...}} ...
local function workers_alive()
  local alive = {}
  for _, node in ipairs(call('ZRANGE', 'cf:workers', 0, -1)) do
    local facts = call('HGETALL', 'cf:worker:' .. node)
    if #facts > 0 then alive[#alive + 1] = {node, facts} end
  end
  return alive
end

-- Failures so far are known: they pause the job no more.
local function judge(key)
  local final = 0
  for _, name in ipairs({'done', 'failed', 'skipped', 'cancelled'}) do
    final = final + tonumber(call('HGET', key, name) or 0)
  end
  call('HSET', key, 'judged_final', final, 'judged_failed', call('HGET', key, 'failed') or 0)
end

local function keep_watch(watch)
  for _, suffix in ipairs({'', ':seen', ':when'}) do
    call('EXPIRE', 'cf:watch:' .. watch .. suffix, WATCH_DAYS * 86400)
  end
end

local function only_active(epoch)
  return call('GET', 'cf:dispatcher:epoch') == epoch
end

-- A new job. fields: name, value ... Done before: nothing changes.
local function create(job, ...)
  if call('EXISTS', 'cf:job:' .. job) == 1 then return 0 end
  call('HSET', 'cf:job:' .. job, 'created', at(now), 'total', 0, 'cursor', 0, 'parts', 0, ...)
  call('ZADD', 'cf:jobs', at(now), job)
  call('SADD', 'cf:open', job)
  return 1
end

local move = {}
local fenced = {}

local function run()
  local name = ARGV[1]
  if move[name] then return move[name](unpack(ARGV, 2)) end
  if not only_active(ARGV[2]) then return redis.error_reply('FENCED another dispatcher is active') end
  return fenced[name](unpack(ARGV, 3))
end

function move.create(job, ...) return create(job, ...) end

-- Whoever listed the job before adds nothing more to it.
function move.take_listing(job, lister)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'lister', lister) end
end

-- The next part of the manifest is in S3. Answers 0 when somebody else lists, or another part was expected; said twice,
-- it counts once. Of its images some may be skipped already: how many, the states of all as they stand in :bits from
-- `offset` on, and the recipe's fingerprint.
function move.add_part(job, lister, part, count, first, last, skipped, offset, states, made)
  local key, entry = 'cf:job:' .. job, cjson.encode({first, last, tonumber(count)})
  if call('HGET', key, 'lister') ~= lister or call('HEXISTS', key, 'listed') == 1 then return 0 end
  if call('HGET', key, 'parts') ~= part then return call('HGET', key .. ':parts', part) == entry and 1 or 0 end
  call('HSET', key .. ':parts', part, entry)
  call('HINCRBY', key, 'parts', 1)
  call('HINCRBY', key, 'total', count)
  if tonumber(skipped) > 0 then
    call('SETRANGE', key .. ':bits', offset, states)
    call('HINCRBY', key, 'skipped', skipped)
    call('HINCRBY', key .. ':tally', 'made ' .. made, skipped)
  end
  return 1
end

function move.listed(job)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'listed', 1) end
end

-- Nothing more is fed until it is unpaused.
function move.pause(job, reason)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'paused', reason) end
end

-- A sample that was fed has been looked at, and failures so far are known: neither pauses the job again.
function move.unpause(job)
  local key = 'cf:job:' .. job
  local sample = call('HGET', key, 'sample')
  if sample and tonumber(call('HGET', key, 'cursor')) >= tonumber(sample) then call('HDEL', key, 'sample') end
  if call('HDEL', key, 'paused') == 0 then return 0 end
  judge(key)
  return 1
end

-- What may change while a job runs: name, value ... An empty value: no such limit.
function move.tune(job, ...)
  local key, args = 'cf:job:' .. job, {...}
  if call('EXISTS', key) == 0 or call('HEXISTS', key, 'closed') == 1 then return 0 end
  for i = 1, #args, 2 do
    if args[i + 1] == '' then call('HDEL', key, args[i]) else call('HSET', key, args[i], args[i + 1]) end
  end
  return 1
end

-- Nothing new is claimed or listed. Answers 0 when the job is closed.
function move.cancel(job)
  local key = 'cf:job:' .. job
  if call('EXISTS', key) == 0 or call('HEXISTS', key, 'closed') == 1 then return 0 end
  if call('HEXISTS', key, 'cancelled_at') == 0 then
    call('HSET', key, 'cancelled_at', at(now), 'listed', 1, 'cancel_cursor', 0)
    call('HDEL', key, 'paused', 'again')
    call('UNLINK', key .. ':again')
  end
  return 1
end

-- Final images are open again, to be fed once more, if the digit of their state is in `states`: index ...
-- A closed job is open again. Answers how many; -1 when the job is cancelled.
function move.reopen(job, states, ...)
  local key, args, changed = 'cf:job:' .. job, {...}, 0
  if call('EXISTS', key) == 0 then return 0 end
  if call('HEXISTS', key, 'cancelled_at') == 1 then return -1 end
  local is_told = call('HEXISTS', key, 'webhook_images') == 1
  for i = 1, #args do
    local state = state_of(job, args[i])
    if state ~= STATE.open and string.find(states, tostring(state), 1, true) then
      call('BITFIELD', key .. ':bits', 'SET', 'u4', '#' .. args[i], STATE.open)
      if state == STATE.review then
        call('HINCRBY', key, 'review', -1)
        state = STATE.done
      end
      for name, value in pairs(STATE) do
        if value == state then call('HINCRBY', key, name, -1) end
      end
      call('HDEL', key .. ':failures', args[i])
      call('SETBIT', key .. ':again', args[i], 1)
      call('SETBIT', key .. ':unsure', args[i], 1)
      if is_told then call('BITFIELD', key .. ':reopened', 'INCRBY', 'u8', '#' .. args[i], 1) end
      call('HINCRBY', key, 'again', 1)
      changed = changed + 1
    end
  end
  if changed > 0 then
    judge(key)
    call('HDEL', key, 'closed')
    call('SADD', 'cf:open', job)
    for _, suffix in ipairs(KEYS_OF_JOB) do call('PERSIST', key .. suffix) end
  end
  return changed
end

-- The first `limit` images that are to be fed once more.
function move.to_feed_again(job, limit)
  local found, from = {}, 0
  while #found < tonumber(limit) do
    local index = call('BITPOS', 'cf:job:' .. job .. ':again', 1, from, -1, 'BIT')
    if index < 0 then break end
    found[#found + 1], from = index, index + 1
  end
  return found
end

-- What S3 holds already of a job that was lost here: index, state ... of images that are final. What is in the window
-- is left to its worker. Answers how many changed.
function move.restore(job, ...)
  local args, changed = {...}, 0
  if call('EXISTS', 'cf:job:' .. job) == 0 then return 0 end
  for i = 1, #args, 2 do
    local fed = call('HEXISTS', 'cf:entry', job .. ':' .. args[i]) == 1
    if not fed and settle(job, args[i], tonumber(args[i + 1])) then changed = changed + 1 end
    call('SETBIT', 'cf:job:' .. job .. ':unsure', args[i], 1)
  end
  return changed
end

-- Counts a job's images by their states, looks for what final images have left in the window, and puts both right
-- (repair: 1). Answers what was counted (COUNTED), what was kept instead, and the images. 0.003 s for each million where
-- most states are alike, 0.07 s at worst.
function move.check(job, repair)
  local COUNTED = {'done', 'failed', 'skipped', 'cancelled', 'review', 'window'}
  local key, total = 'cf:job:' .. job, tonumber(call('HGET', 'cf:job:' .. job, 'total'))
  local bits, of = string.sub(call('GET', key .. ':bits') or '', 1, math.ceil(total / 2)), {}
  for state = 0, 15 do of[state] = 0 end
  while #bits > 0 do  -- all bytes like the first at once: few differ, and Redis waits meanwhile
    local byte = string.byte(bits)
    local char = string.char(byte)
    local pattern = byte == 0 and '%z' or string.find(char, '%w') and char or '%' .. char
    local rest = string.gsub(bits, pattern .. '+', '')
    for _, state in ipairs({byte % 16, math.floor(byte / 16)}) do of[state] = of[state] + #bits - #rest end
    bits = rest
  end
  local entries, left = 0, {}
  for _, id in ipairs(call('HKEYS', 'cf:entry')) do
    local owner, index = split(id)
    if owner == job then
      if tonumber(index) >= total or state_of(job, index) ~= STATE.open then
        left[#left + 1] = id
      else
        entries = entries + 1
      end
    end
  end
  local claims = call('HGETALL', 'cf:claim')
  for i = 1, #claims, 2 do
    if split(claims[i + 1]) == job and call('HEXISTS', 'cf:entry', claims[i + 1]) == 0 then
      left[#left + 1] = claims[i + 1]
      if repair == '1' then call('HDEL', 'cf:claim', claims[i]) end
    end
  end
  local counted = {of[1] + of[5], of[2], of[3], of[4], of[5], entries}
  local kept = call('HMGET', key, unpack(COUNTED))
  if repair == '1' then
    for _, id in ipairs(left) do leave_window(id) end
    for i, name in ipairs(COUNTED) do
      call('HSET', key, name, counted[i])
    end
  end
  return {counted, kept, left}
end

-- A live job as a whole: queue, message, row ... in the order of its indexes, then its fields. Done before: nothing
-- changes.
function move.submit(job, lease, count, ...)
  local args = {...}
  if create(job, unpack(args, 1 + 3 * count)) == 0 then return 0 end
  call('HSET', 'cf:job:' .. job, 'listed', 1)
  enter_live(job, lease, 0, {unpack(args, 1, 3 * count)})
  return 1
end

-- More images for the live job that a watch feeds; the first ones make it. digest, ETag seen before, ETag, queue,
-- message, row ... in the order of their indexes from `total` on, then the job's fields. moved: somebody else came first,
-- nothing changed, look again. over: this job takes no more.
function move.append(job, watch, lease, total, count, ...)
  local key, seen, args, rows = 'cf:job:' .. job, 'cf:watch:' .. watch, {...}, {}
  for _, flag in ipairs({'listed', 'cancelled_at', 'closed'}) do
    if call('HEXISTS', key, flag) == 1 then return 'over' end
  end
  if (call('HGET', key, 'total') or '0') ~= total then return 'moved' end
  for i = 1, 6 * count, 6 do
    if (call('HGET', seen .. ':seen', args[i]) or '') ~= args[i + 1] then return 'moved' end
  end
  create(job, unpack(args, 1 + 6 * count))
  for i = 1, 6 * count, 6 do
    call('HSET', seen .. ':seen', args[i], args[i + 2])
    call('ZADD', seen .. ':when', at(now), args[i])
    for j = 3, 5 do rows[#rows + 1] = args[i + j] end
  end
  keep_watch(watch)
  enter_live(job, lease, tonumber(total), rows)
  return 'ok'
end

-- A listing of all that is watched is complete: what was seen more than `keep` seconds before it is forgotten, so many
-- at a time. Answers how many.
function move.swept(watch, began, keep, limit)
  local seen = 'cf:watch:' .. watch
  call('HSET', seen, 'swept', began)
  keep_watch(watch)
  local old = call('ZRANGEBYSCORE', seen .. ':when', '-inf', at(math.min(now, began) - keep), 'LIMIT', 0, limit)
  for _, digest in ipairs(old) do
    call('HDEL', seen .. ':seen', digest)
    call('ZREM', seen .. ':when', digest)
  end
  return #old
end

-- go: this token now holds the image and its output. busy: somebody else holds the image, or it waits for its retry.
-- taken: another image holds the output; looked at again in a while. suspect: only for who works on nothing else
-- (alone: 1); on its own queue now. final, cancelled, gone: nothing to do.
function move.claim(id, token, output, lease, alone)
  local job, index = split(id)
  if not job or call('EXISTS', 'cf:job:' .. job) == 0 then return {'gone'} end
  if state_of(job, index) ~= STATE.open then
    leave_window(id)
    return {'final'}
  end
  if call('HEXISTS', 'cf:entry', id) == 0 then return {is_cancelled(id) and 'cancelled' or 'gone'} end
  local lease_ends = call('ZSCORE', 'cf:leased', id)
  if lease_ends and not holds(id, token) then
    if tonumber(lease_ends) > now then return {'busy'} end
    count_vanished(id)
  end
  if is_cancelled(id) then return {'cancelled'} end
  if call('ZSCORE', 'cf:retry', id) then return {'busy'} end
  if alone ~= '1' and is_suspect(id) then
    wait_again(id, lease)
    return {'suspect'}
  end
  local other = call('HGET', 'cf:claim', output)
  if other and other ~= id then
    if tonumber(call('ZSCORE', 'cf:leased', other) or 0) > now then
      call('ZREM', 'cf:waiting', id)
      call('ZADD', 'cf:retry', at(now + lease / 4), id)
      return {'taken'}
    end
  end
  call('HSET', 'cf:owner', id, token .. ' ' .. output)
  call('HSET', 'cf:claim', output, id)
  call('ZADD', 'cf:leased', at(now + lease), id)
  call('ZREM', 'cf:waiting', id)
  local published = call('HGET', 'cf:published', id)
  local tries, vanished = call('HGET', 'cf:tries', id) or 0, call('HGET', 'cf:vanished', id) or 0
  local blamed, died = call('HGET', 'cf:blamed', id) or '', call('HGET', 'cf:died', id) or 0
  return {'go', tonumber(tries), tonumber(vanished), published and at(now - published) or '', blamed, tonumber(died)}
end

-- id, token ...: the lease of each runs anew. Answers the ids that are no longer held.
function move.renew(lease, ...)
  local args, lost = {...}, {}
  for i = 1, #args, 2 do
    if holds(args[i], args[i + 1]) then
      call('ZADD', 'cf:leased', 'XX', at(now + lease), args[i])
    else
      lost[#lost + 1] = args[i]
    end
  end
  return lost
end

-- The image is final. ok: counted now. final: it was before. stale: this token no longer holds it; nothing changed.
-- Of a done image: a remark, empty when there is nothing to say, and what it adds to the job's tally: word, count ...
function move.finish(id, token, state, failure, remark, ...)
  local job, index = split(id)
  if not holds(id, token) then
    if call('EXISTS', 'cf:job:' .. job) == 1 and state_of(job, index) ~= STATE.open then return 'final' end
    return 'stale'
  end
  local counted = call('EXISTS', 'cf:job:' .. job) == 1 and settle(job, index, tonumber(state))
  if counted and failure ~= '' then call('HSET', 'cf:job:' .. job .. ':failures', index, failure) end
  if counted then
    local key = 'cf:job:' .. job
    if remark ~= '' and call('HLEN', key .. ':remarks') < MAX_REMARKS then
      call('HSET', key .. ':remarks', index, remark)
    end
    local counts = {...}
    for i = 1, #counts, 2 do call('HINCRBY', key .. ':tally', counts[i], counts[i + 1]) end
    tell(job, id, 'webhook_images')
  end
  leave_window(id)
  return counted and 'ok' or 'final'
end

-- This try failed: wait, then try again.
function move.defer(id, token, pause)
  if not holds(id, token) then return 'stale' end
  drop_claim(id)
  if is_cancelled(id) then return 'ok' end
  call('HINCRBY', 'cf:tries', id, 1)
  call('ZADD', 'cf:retry', at(now + pause), id)
  return 'ok'
end

-- Given back unfinished, no try used up: behind the others on its queue.
function move.release(id, token, lease)
  if not holds(id, token) then return 'stale' end
  drop_claim(id)
  if not is_cancelled(id) then wait_again(id, lease) end
  return 'ok'
end

-- The worker is going down, and this image may be why. As if it had fallen silent, but at once, with its error.
function move.vanish(id, token, error, lease)
  if not holds(id, token) then return 'stale' end
  call('SREM', 'cf:computing', id)
  count_vanished(id)
  if is_cancelled(id) then return 'ok' end
  call('HSET', 'cf:blamed', id, error)
  wait_again(id, lease)
  return 'ok'
end

-- Whether this image, alone in its worker, is being computed (on: 1): if the worker dies meanwhile, it counts as died.
function move.computing(id, token, on)
  if not holds(id, token) then return 'stale' end
  call(on == '1' and 'SADD' or 'SREM', 'cf:computing', id)
  return 'ok'
end

function move.heartbeat(node, ttl, ...)
  call('DEL', 'cf:worker:' .. node)
  call('HSET', 'cf:worker:' .. node, ...)
  call('EXPIRE', 'cf:worker:' .. node, ttl)
  call('ZADD', 'cf:workers', at(now), node)
  call('ZREMRANGEBYSCORE', 'cf:workers', '-inf', at(now - 86400))
end

function move.workers() return workers_alive() end

-- A job, its tally and the workers, in one round trip: each may wait behind others' moves.
function move.look(job)
  return {call('HGETALL', 'cf:job:' .. job), call('HGETALL', 'cf:job:' .. job .. ':tally'), workers_alive()}
end

-- The size of the window by place, then of each queue its length and the age of its oldest message, in seconds.
function move.survey(...)
  local found = {call('ZCARD', 'cf:waiting'), call('ZCARD', 'cf:leased'), call('ZCARD', 'cf:retry')}
  for _, queue in ipairs({...}) do
    local oldest = call('LINDEX', queue, -1)
    local id = oldest and string.match(oldest, '"correlation_id": ?"([^"]+)"')
    local published = id and call('HGET', 'cf:published', id)
    found[#found + 1] = call('LLEN', queue)
    found[#found + 1] = at(published and now - published or 0)
  end
  return found
end

-- Receivers that have events which are due, the one that waits longest first.
function move.receivers_due(limit) return call('ZRANGEBYSCORE', 'cf:outbox', '-inf', at(now), 'LIMIT', 0, limit) end

-- A receiver's events that are due, each with the deliveries that failed and the time until which it is the caller's:
-- event, tries, until ...
function move.take_events(receiver, limit, lease)
  local outbox, taken, ends = 'cf:outbox:' .. receiver, {}, at(now + lease)
  for _, event in ipairs(call('ZRANGEBYSCORE', outbox, '-inf', at(now), 'LIMIT', 0, limit)) do
    call('ZADD', outbox, ends, event)
    for _, fact in ipairs({event, call('HGET', 'cf:outbox:tries', event) or '0', ends}) do taken[#taken + 1] = fact end
  end
  await_turn(receiver)
  return taken
end

-- What became of a delivery: sent, later (after `pause` seconds) or given_up. Nothing changes when the event is not the
-- caller's any more, or happened again meanwhile.
function move.delivered(receiver, event, ends, outcome, pause)
  local outbox = 'cf:outbox:' .. receiver
  if tonumber(call('ZSCORE', outbox, event) or 0) ~= tonumber(ends) then return 0 end
  if outcome == 'later' then
    call('ZADD', outbox, at(now + pause), event)
    call('HINCRBY', 'cf:outbox:tries', event, 1)
    await_turn(receiver)
    return 1
  end
  call('DECRBY', 'cf:outbox:size', call('ZREM', outbox, event))
  call('HDEL', 'cf:outbox:tries', event)
  await_turn(receiver)
  local key = 'cf:job:' .. (split(event) or event)
  if outcome == 'given_up' and call('EXISTS', key) == 1 then call('HINCRBY', key, 'untold', 1) end
  return 1
end

-- What there is to tell of an image, all of one moment: its state, how often it was opened again, its failure or ''.
function move.outcome(job, index)
  local key = 'cf:job:' .. job
  local reopened = call('BITFIELD', key .. ':reopened', 'GET', 'u8', '#' .. index)[1]
  return {state_of(job, index), reopened, call('HGET', key .. ':failures', index) or ''}
end

-- The events of images [from, to) that are final are due again, up to the first that does not fit. Answers how many, and
-- where to go on.
function move.retell(job, from, to)
  if call('HEXISTS', 'cf:job:' .. job, 'webhook_images') == 0 then return {0, tonumber(to)} end
  local receiver, count = receiver_of(job), 0
  for index = from, to - 1 do
    local number = string.format('%d', index)
    if state_of(job, number) ~= STATE.open then
      if not make_due(receiver, job .. ':' .. number) then return {count, index} end
      count = count + 1
    end
  end
  return {count, tonumber(to)}
end

-- The event of a closed job is due again, and what was not told is no longer counted.
function move.retell_job(job)
  local key = 'cf:job:' .. job
  call('HDEL', key, 'untold')
  if call('HEXISTS', key, 'closed') == 0 then return 0 end
  tell(job, job, 'webhook')
  return 1
end

-- Become or stay the active dispatcher: answers the fencing token, or false while another is active.
function move.lead(me, ttl_ms)
  local active = call('GET', 'cf:dispatcher')
  if active and active ~= me then return false end
  call('SET', 'cf:dispatcher', me, 'PX', ttl_ms)
  if not active then call('INCR', 'cf:dispatcher:epoch') end
  return call('GET', 'cf:dispatcher:epoch')
end

function move.resign(me)
  if call('GET', 'cf:dispatcher') == me then call('DEL', 'cf:dispatcher') end
end

-- Whether this dispatcher is still the active one: else it is told so, as with every move of this kind.
function fenced.still() return 1 end

-- As `pause`, by the dispatcher.
function fenced.hold(job, reason)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'paused', reason) end
end

-- The cursor moves over images that are final already. Answers false when it was elsewhere.
function fenced.pass_over(job, cursor, to)
  local key = 'cf:job:' .. job
  if call('HGET', key, 'cursor') ~= cursor then return false end
  call('HSET', key, 'cursor', to)
  return true
end

-- Writes what a full Redis refuses.
function fenced.room()
  call('SET', 'cf:room', '')
end

-- The next images of a job go on their queues: window and cursor move together. Rows: queue, message, one after another
-- from `cursor` on; without a queue, the image fails as the message says; final images are passed over. Answers how many
-- went on a queue, or false when the cursor was
-- elsewhere or the job may not be fed.
function fenced.feed(job, cursor, lease, ...)
  local key, args = 'cf:job:' .. job, {...}
  if call('HGET', key, 'cursor') ~= cursor then return false end
  if call('HEXISTS', key, 'cancelled_at') == 1 or call('HEXISTS', key, 'paused') == 1 then return false end
  local index, entered = tonumber(cursor), 0
  for i = 1, #args, 2 do
    if state_of(job, index) == STATE.open then
      local number = string.format('%d', index)
      if args[i] ~= '' then
        enter(job .. ':' .. number, args[i], args[i + 1], lease)
        entered = entered + 1
      else
        settle(job, number, STATE.failed)
        call('HSET', key .. ':failures', number, args[i + 1])
        tell(job, job .. ':' .. number, 'webhook_images')
      end
    end
    index = index + 1
  end
  call('HSET', key, 'cursor', string.format('%d', index))
  return entered
end

-- The first rows of a live job are in S3 now, as a part of its manifest. Answers 0 when another part was expected.
function fenced.record(job, part, count, first, last)
  local key = 'cf:job:' .. job
  if call('HGET', key, 'parts') ~= part then return 0 end
  call('HSET', key .. ':parts', part, cjson.encode({first, last, tonumber(count)}))
  call('HINCRBY', key, 'parts', 1)
  call('HINCRBY', key, 'unrecorded', -count)
  call('LTRIM', key .. ':rows', count, -1)
  return 1
end

-- Retries whose time has come go on their queues again.
function fenced.retry_due(lease, limit)
  local due = call('ZRANGEBYSCORE', 'cf:retry', '-inf', at(now), 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    call('ZREM', 'cf:retry', id)
    if not is_cancelled(id) and call('HEXISTS', 'cf:entry', id) == 1 then wait_again(id, lease) end
  end
  return #due
end

-- Images whose worker fell silent go on their queues again; who lost two workers goes to `suspect`.
function fenced.reclaim(lease, limit)
  local ended = call('ZRANGEBYSCORE', 'cf:leased', '-inf', at(now), 'LIMIT', 0, limit)
  for _, id in ipairs(ended) do
    count_vanished(id)
    if not is_cancelled(id) and call('HEXISTS', 'cf:entry', id) == 1 then wait_again(id, lease) end
  end
  return ended
end

function fenced.overdue(limit)
  return call('ZRANGEBYSCORE', 'cf:waiting', '-inf', at(now), 'LIMIT', 0, limit)
end

-- Overdue images whose message still exists wait on; those without one get another. id, 1 (exists) or 0 ...
function fenced.look_again(lease, ...)
  local args, published = {...}, 0
  for i = 1, #args, 2 do
    local id = args[i]
    local due = call('ZSCORE', 'cf:waiting', id)
    if due and tonumber(due) <= now and not is_cancelled(id) then
      if args[i + 1] == '1' then
        call('ZADD', 'cf:waiting', at(now + lease), id)
      else
        wait_again(id, lease)
        published = published + 1
      end
    end
  end
  return published
end

-- Of a cancelled job, which has entered the window for the last time: what stands there and no worker holds is final.
-- Looks at some `count` entries of the window, from `scan` on. Answers where to go on ('0': at its end), and the indexes
-- of what a worker holds.
function fenced.cancel_fed(job, scan, count)
  local found = call('HSCAN', 'cf:entry', scan, 'COUNT', count)
  local answer = {found[1]}
  for i = 1, #found[2], 2 do
    local id = found[2][i]
    local owner, index = split(id)
    if owner == job then
      if call('ZSCORE', 'cf:leased', id) then answer[#answer + 1] = index else is_cancelled(id) end
    end
  end
  return answer
end

-- The next `count` images of a cancelled job, an even number of them, are final, but for those in `left` (indexes, with
-- spaces). Two at a time: ten million would else take minutes. Answers how far it came, or false when it was elsewhere.
function fenced.cancel_rest(job, cursor, count, left)
  local key = 'cf:job:' .. job
  if call('HGET', key, 'cancel_cursor') ~= cursor then return false end
  local from, total, held = tonumber(cursor), tonumber(call('HGET', key, 'total')), {}
  for index in string.gmatch(left, '%d+') do
    if state_of(job, index) == STATE.open then held[#held + 1] = index end
  end
  local to, changed = math.min(from + count, total), 0
  local function cancel_both(bytes)
    changed = changed + 2 * #bytes
    return string.rep('\68', #bytes)
  end
  local function cancel_one(byte)
    changed = changed + 1
    return string.char(string.byte(byte) + (string.byte(byte) < 16 and 64 or 4))
  end
  local start, bytes = from / 2, math.floor((to - from) / 2)
  local states = call('GETRANGE', key .. ':bits', start, start + bytes - 1)
  states = bytes == 0 and '' or states .. string.rep('\0', bytes - #states)
  states = string.gsub(string.gsub(states, '%z+', cancel_both), '[\1-\15\16\32\48\64\80]', cancel_one)
  call('SETRANGE', key .. ':bits', start, states)
  if to % 2 == 1 then settle(job, to - 1, STATE.cancelled) end
  for _, index in ipairs(held) do
    call('BITFIELD', key .. ':bits', 'SET', 'u4', '#' .. index, STATE.open)
    changed = changed - 1
  end
  call('HINCRBY', key, 'cancelled', changed)
  call('HSET', key, 'cancel_cursor', string.format('%d', to))
  return to
end

-- Images that are to be fed once more go on their queues: index, queue, message ... Answers how many.
function fenced.feed_again(job, lease, ...)
  local key, args, fed = 'cf:job:' .. job, {...}, 0
  if call('HEXISTS', key, 'cancelled_at') == 1 or call('HEXISTS', key, 'paused') == 1 then return 0 end
  for i = 1, #args, 3 do
    if call('SETBIT', key .. ':again', args[i], 0) == 1 then
      call('HINCRBY', key, 'again', -1)
      enter(job .. ':' .. args[i], args[i + 1], args[i + 2], lease)
      fed = fed + 1
    end
  end
  return fed
end

-- Failures that stand in S3 by now, as part `number`: index, when it failed ... Those that changed meanwhile stay.
function fenced.spilled(job, number, ...)
  local key, args = 'cf:job:' .. job, {...}
  if (call('HGET', key, 'spills') or '0') ~= number then return 0 end
  for i = 1, #args, 2 do
    local failure = call('HGET', key .. ':failures', args[i])
    if failure and string.find(failure, '"at": ' .. args[i + 1], 1, true) then
      call('HDEL', key .. ':failures', args[i])
    end
  end
  return call('HINCRBY', key, 'spills', 1)
end

-- A job whose images are all final is closed and forgotten after `keep` seconds; with each, of some jobs those that are
-- forgotten by now leave the list. Which some, is left to chance: the oldest may be there for ever.
function fenced.close(job, keep)
  local key = 'cf:job:' .. job
  if call('HEXISTS', key, 'closed') == 1 then return 0 end
  local sum = 0
  for _, name in ipairs({'done', 'failed', 'skipped', 'cancelled'}) do
    sum = sum + tonumber(call('HGET', key, name) or 0)
  end
  if call('HEXISTS', key, 'listed') == 0 or sum ~= tonumber(call('HGET', key, 'total')) then return 0 end
  call('HSET', key, 'closed', at(now))
  call('SREM', 'cf:open', job)
  tell(job, job, 'webhook')
  for _, suffix in ipairs(KEYS_OF_JOB) do call('EXPIRE', key .. suffix, keep) end
  for _, old in ipairs(call('ZRANDMEMBER', 'cf:jobs', PRUNED)) do
    if call('EXISTS', 'cf:job:' .. old) == 0 then call('ZREM', 'cf:jobs', old) end
  end
  return 1
end
