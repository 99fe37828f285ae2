# The lease, its watchdog, and the end of both. Sourced by ext.
#
# The folder $JOB is the lease: made by mkdir, which only one can win. It stays after the resume, so that whoever asks
# again gets the same answer, and is replaced by the next job's.

# Whether a job holds the guest; sets $holder and $left (seconds).
lease_alive() {
    [ -e "$JOB/name" ] && [ ! -e "$JOB/answer" ] || return 1
    read -r holder <"$JOB/name"
    until=0
    [ ! -e "$JOB/until" ] || read -r until <"$JOB/until"
    clock
    left=$((until - now))
    [ "$left" -gt 0 ]
}

take_lease() {
    mkdir -p -m 0700 "$RUN" || fail 20 "$RUN cannot be made"
    if [ -e "$JOB" ]; then
        if lease_alive && [ "$holder" != "$job" ]; then
            fail 11 "job $holder holds the guest for another $left s at most"
        fi
        if [ -e "$JOB/name" ] && [ ! -e "$JOB/answer" ]; then
            holder=$(cat "$JOB/name")
            [ "$holder" = "$job" ] || note "job $holder had not let go of the guest: it was resumed"
            (job=$holder && by=host && verb_resume) >/dev/null 2>&1
        fi
        rm -rf "$JOB"
    fi
    mkdir -m 0700 "$JOB" 2>/dev/null || fail 11 "another job takes the guest at this moment"
    mkdir "$JOB/state" "$JOB/records" "$JOB/log" "$JOB/result" || fail 20 "$RUN is full"
    clock
    echo $((now + limit_s + freeze_s + 60)) >"$JOB/until"
    : >"$JOB/started"
    printf '%s\n' "$uuid" "$goal" "$limit_s" "$freeze_s" "$app_options" >"$JOB/asked"
    echo "$job" >"$JOB/name" || fail 20 "$RUN is full"
}

# Sets $way to how a watchdog here would thaw; empty: there is no way.
watchdog_way() {
    if [ -w /proc/sysrq-trigger ]; then
        way=sysrq
    elif command -v fsfreeze >/dev/null; then
        way=fsfreeze
    else
        way=
    fi
}

# Starts a watchdog that fires in $1 seconds, then ends the one before. Sets $armed, $way.
arm() {
    armed=false
    watchdog_way
    [ -n "$way" ] || { way="the guest has neither sysrq nor fsfreeze"; return; }
    old=$(cat "$JOB/watchdog" 2>/dev/null)
    rm -f "$JOB/watchdog"
    cp "$HERE/watchdog" "$RUN/watchdog" 2>/dev/null || { way="$RUN is full"; return; }
    setsid /bin/sh "$RUN/watchdog" "$1" "$job" "$way" "$HERE/ext" "$JOB" </dev/null >/dev/null 2>&1 &
    patience=250
    until [ -s "$JOB/watchdog" ] || [ $((patience -= 1)) -eq 0 ]; do sleep 0.02; done
    [ -s "$JOB/watchdog" ] || { way="the watchdog did not start"; return; }
    armed=true
    clock
    echo $((now + $1 + 60)) >"$JOB/until"
    [ -z "$old" ] || kill -- "-$old" 2>/dev/null
}

# Whatever this job holds is let go; prints the answer. Called once per job.
resume() {
    lost= failed=
    {
        read -r uuid
        read -r goal
        read -r limit_s
        read -r freeze_s
        read -r app_options
    } <"$JOB/asked"
    [ ! -e "$JOB/failed" ] || failed=yes
    check_holders
    watchdog=absent
    pid=$(cat "$JOB/watchdog" 2>/dev/null)
    if [ -e "$JOB/fired" ]; then
        watchdog=fired
    elif [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        watchdog=silent
    fi
    [ "$by" = watchdog ] || [ -z "$pid" ] || kill -- "-$pid" 2>/dev/null
    rm -f "$JOB"/result/*.post
    post_scripts
    keep_log
    answer "\"watchdog\": \"$watchdog\", \"holders_lost\": [$lost], \"scripts\": [$(results post)],
        \"records\": {$(records)}, \"log\": \"$(base64 <"$JOB/all.log" | tr -d '\n')\", \"notes\": [$notes]"
}

# The job's output behind the guest's own log of all jobs, which may be full or read-only.
keep_log() {
    for file in "$JOB"/log/*.pre.log "$JOB"/log/*.post.log; do
        [ -s "$file" ] || continue
        name=${file##*/}
        echo "== ${name%.log}"
        cat "$file"
        echo
    done >"$JOB/all.log"
    [ -s "$JOB/all.log" ] || return 0
    {
        mkdir -p -m 0700 "$LOGS" && {
            [ ! -e "$LOGS/scripts.log" ] || [ "$(wc -c <"$LOGS/scripts.log")" -lt 1048576 ] ||
                mv "$LOGS/scripts.log" "$LOGS/scripts.log.1"
            { echo "==== job $job, $(date)" && cat "$JOB/all.log"; } >>"$LOGS/scripts.log"
        }
    } 2>/dev/null
    return 0
}
