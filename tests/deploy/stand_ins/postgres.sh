#!/bin/sh
# The entry point of the stand-in for postgres:18: makes the database once, then runs the server as its user.
set -eu
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups -- "$@"; }
mkdir -p "$PGDATA"
chown postgres:postgres "$PGDATA"
chmod 700 "$PGDATA"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    umask 077
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
    chown postgres /tmp/password
    as_postgres initdb --pgdata="$PGDATA" --username=postgres --auth=scram-sha-256 --encoding=UTF8 --locale=C \
        --pwfile=/tmp/password
    rm /tmp/password
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    echo "listen_addresses = '*'" >> "$PGDATA/postgresql.conf"
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups -- "$@"
