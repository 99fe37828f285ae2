# Holding a guest for one point in time and letting go: `probe`, `quiesce`, `resume`.
#
# Whoever dies in between, `resume` is called: by the host, by the next job, or by the watchdog; each script's `post`
# is run once all the same. Until it has ended nothing is written but to memory.

RECORD_BYTES=65536
ALL_RECORDS_BYTES=163840
LOG_BYTES=131072
LOG_FILE_BYTES=1048576
WAIT_SECONDS=170

count=0  # application scripts
numbers= # of those to be run
homes=
results= # JSON of all runs
failed=  # not empty: a script failed
ticker=

enter_memory() {
    [ -d "$mem" ] || mkdir -p "$mem" 2>/dev/null || fail 20 "$mem cannot be made"
    [ -O "$mem" ] && [ ! -h "$mem" ] || fail 30 "$mem does not belong to root"
}

verb_probe() {
    require_tools
    enter_memory
    find_method
    . "$here/lib/scripts.sh"
    . "$here/lib/apps.sh"
    read_tables sockets
    find_apps
    leave_out_needless
    now
    dir=$mem/probe.$$-$now
    name_homes
    { mkdir -p $homes && keep_scripts; } 2>/dev/null || give_up "$mem cannot be written"
    phase_until=$((now + 2000))
    run_phase probe $numbers
    end_ticks
    apps=
    while read -r app phase outcome rest; do
        [ "$outcome" != ok ] || apps=${apps:+$apps,}\"$app\"
    done 2>/dev/null <"$dir/results"
    rm -rf "$dir"
    watchdog=true
    [ -n "$method" ] || watchdog=false
    quote "${method:-neither sysrq nor fsfreeze}"
    done_with "\"watchdog\":$watchdog,\"detail\":$json,\"apps\":[$apps],\"notes\":[$notes]"
}

# --- quiesce ---------------------------------------------------------------------------------------------------

verb_quiesce() {
    case $job in '' | */*) fail 30 '--job is needed' ;; esac
    case $goal in crash | filesystem | application) ;; *) fail 30 "--goal: $goal is none" ;; esac
    require_tools
    enter_memory
    find_method
    if [ "$goal" = application ]; then
        . "$here/lib/scripts.sh"
        . "$here/lib/apps.sh"
        read_tables sockets
        find_apps
        leave_out_needless
    else
        read_tables
    fi
    take_lease
    first_s=$freeze_s
    [ "$count" -eq 0 ] || first_s=$((limit_s + freeze_s))
    armed=true
    arm 1 "$first_s" || armed=false
    [ "$count" -eq 0 ] || keep_scripts || let_go "$mem cannot be written: is it full?"
    find_mounts
    list_mounts "$dir/mounts"
    if [ "$count" -gt 0 ]; then
        run_pre_scripts
        read -r state <"$dir/watchdog.state"
        [ "$state" != fired ] || let_go 'the pre scripts took longer than the watchdog waits' 60
        arm_again "$freeze_s" || arm 2 "$freeze_s" || armed=false
        end_ticks
    fi
    detail=$method
    if [ -z "$method" ]; then
        armed=false
        detail='this guest has neither sysrq nor fsfreeze'
    elif ! is_memory "$beneath"; then
        armed=false
        detail='/run is on a disk here: the watchdog itself would be held by the freeze'
    elif [ "$armed" = false ]; then
        detail='it could not be started'
    fi
    quote "$detail"
    fields="\"watchdog\":$armed,\"watchdog_detail\":$json,\"mounts\":[$mounts],\"partial\":$partial"
    done_with "$fields,\"scripts\":[$results],\"notes\":[$notes]"
}

# Whether a file system of type $1 is in memory.
is_memory() {
    case $1 in tmpfs | ramfs | rootfs) ;; *) return 1 ;; esac
}

# Ends the job because of $1, with exit code $2.
let_go() {
    /bin/sh "$here/ext" resume --job "$job" >/dev/null 2>&1 </dev/null
    fail "${2:-20}" "$1"
}

# Runs `pre` of all, and `post` at once if one failed.
run_pre_scripts() {
    now
    phase_until=$((now + limit_s * 100))
    run_phase pre $numbers
    if [ -n "$failed" ]; then
        : >"$dir/failed"
        run_post_scripts
    fi
}

# Runs `post`, the last ones first, for all that had started and have not had it.
run_post_scripts() {
    result=ok
    [ ! -e "$dir/failed" ] || result=failed
    due=
    for number in $numbers; do
        load "$number"
        [ -e "$home/started" ] && [ ! -e "$home/posted" ] || continue
        : >"$home/posted"
        [ ! -e "$home/state/no-post" ] || continue
        due="$number $due"
    done
    now
    phase_until=$((now + 100 * 86400))
    run_phase post $due
}

# --- resume ----------------------------------------------------------------------------------------------------

verb_resume() {
    [ -n "$job" ] || fail 30 '--job is needed'
    enter_memory
    claim_job
    ask_watchdog
    stop_what_runs
    read_apps
    lost=
    if [ "$count" -gt 0 ]; then
        . "$here/lib/scripts.sh"
        find_lost_holders
        run_post_scripts
        end_ticks
    fi
    records=
    collect_records
    joined=
    IFS=$newline
    is_worth_a_log && join $(IFS=$words; print_log | base64)
    IFS=$words
    log=$joined
    fields="\"watchdog\":\"$watched\",\"holders_lost\":[$lost],\"scripts\":[$results],\"records\":{$records}"
    fields="$fields,\"log\":\"$log\",\"notes\":[$notes]"
    # Whoever asks again is told the same.
    printf '%s\n{"verb":"resume","ok":true,%s}\n' "$job" "$fields" >"$mem/last" 2>/dev/null || : >"$mem/last"
    now
    echo "$now" >"$dir/ended"
    rm -f "$mem/lease"
    [ "$by" = watchdog ] || end_watchdog
    # The log goes to a disk that may be slow, or frozen by somebody else: nobody waits for it.
    (
        trap '' HUP
        write_log
        rm -rf "$dir"
    ) >/dev/null 2>&1 </dev/null 8>&- &
    done_with "$fields"
}

# Makes this process the one that resumes $job, and sets $dir. If another one is at it, waits; answers and ends if
# there is nothing more to do.
claim_job() {
    now
    patience=$((now + WAIT_SECONDS * 100))
    while read_lease && [ "$held_job" = "$job" ]; do
        dir=$held_dir
        if ! is_claimed; then
            started_at $$
            # Where memory is full, better twice than never.
            if ! echo "$$ $start" >"$dir/claiming.$$" || ln "$dir/claiming.$$" "$dir/claim.$((claims + 1))"; then
                # The one before may have come to its end, lease and all, after the lease was read.
                read_lease && [ "$held_dir" = "$dir" ] && return
                continue
            fi
        fi
        now
        [ "$now" -lt "$patience" ] || fail 60 "job $job is being resumed, which takes too long"
        sleep 1
    done 2>/dev/null
    # It is over, or never was. The watchdog of a job that is over may still be thawing.
    [ -n "$held_job" ] || [ "$by" = watchdog ] || end_watchdog
    last=
    { read -r last <"$mem/last"; } 2>/dev/null
    if [ "$last" = "$job" ]; then
        tail -n +2 "$mem/last"
        exit 0
    fi
    done_with '"watchdog":"absent"' 3
}

# A `quiesce` that was given up may still run (unless that is who asks), and so may its scripts: no `post` beside its
# `pre`.
stop_what_runs() {
    [ "$taker" = "$PPID" ] || { alive "$taker" "$taker_start" && kill -KILL "$taker"; }
    set +f
    for file in "$dir"/app/*/pid; do
        set -f
        pid=
        { read -r pid pid_start <"$file"; } 2>/dev/null
        alive "$pid" "$pid_start" && kill -KILL "-$pid"
    done
    set -f
}

# Sets $count, $numbers and the scripts as `quiesce` knew them.
read_apps() {
    count=0
    numbers=
    [ -e "$dir/apps" ] && [ -e "$dir/facts" ] || return
    { read -r uuid && read -r goal && read -r freeze_s && read -r options; } <"$dir/facts"
    while read -r app folder; do
        count=$((count + 1))
        eval "app_$count=\$app folder_$count=\$folder"
        numbers="$numbers $count"
    done <"$dir/apps"
}

# Sets $lost to the scripts whose holder no longer lives. Those that wait for a signal let go at once: until its `post`
# runs, an application would stand still for as long as it takes to start several programs.
find_lost_holders() {
    for number in $numbers; do
        load "$number"
        [ -e "$home/state/holder" ] && [ ! -e "$home/posted" ] || continue
        holder=
        { read -r holder start_then <"$home/holder"; } 2>/dev/null
        if ! alive "$holder" "$start_then"; then
            lost=${lost:+$lost,}\"$app\"
        elif [ -e "$home/state/signal" ]; then
            kill -USR1 "$holder"
        fi
    done
}

# Sets $records to what the scripts left to be stored with the point.
collect_records() {
    left_in_all=$ALL_RECORDS_BYTES
    for number in $numbers; do
        load "$number"
        left_here=$RECORD_BYTES
        set +f
        for file in "$home"/records/*; do
            set -f
            [ -f "$file" ] && [ ! -h "$file" ] || continue
            collect "$file" "${file##*/}"
        done
        set -f
    done
}

collect() {
    case $2 in
        *[!A-Za-z0-9._-]* | ?????????????????????????????????????????????????????????????????*)
            note "$app: a record with this name is not stored: $2"
            return
            ;;
    esac
    size=$(wc -c <"$1")
    left_here=$((left_here - size))
    left_in_all=$((left_in_all - size))
    if [ "$left_here" -lt 0 ] || [ "$left_in_all" -lt 0 ]; then
        note "$app: the record $2 is too large and is not stored ($size bytes)"
        left_here=$((left_here + size))
        left_in_all=$((left_in_all + size))
        return
    fi
    records=${records:+$records,}\"$app/$2\":\"
    IFS=$newline
    join $(base64 <"$1")
    records=$records$joined\"
}

# Sets $joined to all words without anything in between.
join() {
    IFS=
    joined=$*
    IFS=$words
}

# --- log -------------------------------------------------------------------------------------------------------

# Whether anything but scripts without an application was run.
is_worth_a_log() {
    while read -r app phase outcome rest; do
        [ "$outcome" = not_applicable ] || return 0
    done 2>/dev/null <"$dir/results"
    return 1
}

# Prints outcomes and output of all scripts; for the answer each output is cut so that all fit.
print_log() {
    outputs=1
    while read -r app phase rest; do
        [ -s "$dir/out/$app.$phase" ] && outputs=$((outputs + 1))
    done <"$dir/results"
    most=$((LOG_BYTES / outputs))
    [ "$most" -le "$OUTPUT_BYTES" ] || most=$OUTPUT_BYTES
    [ "$1" != whole ] || most=$OUTPUT_BYTES
    while read -r app phase outcome code seconds; do
        echo "== $app $phase: $outcome, exit code $code, $seconds s"
        [ -s "$dir/out/$app.$phase" ] && head -c "$most" "$dir/out/$app.$phase" && echo
    done <"$dir/results"
}

# Appends to the log on disk.
write_log() {
    is_worth_a_log || return
    logs=/var/log/stillframe
    state_of "$root"
    mkdir -p "$logs" "$state" || return
    print_log whole >"$state/last.log"
    if [ -f "$logs/scripts.log" ] && [ "$(wc -c <"$logs/scripts.log")" -gt "$LOG_FILE_BYTES" ]; then
        mv -f "$logs/scripts.log" "$logs/scripts.log.1"
    fi
    {
        echo "$(date -u '+%Y-%m-%d %H:%M:%S') job $job"
        cat "$state/last.log"
    } >>"$logs/scripts.log"
}
