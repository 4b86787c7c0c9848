//! The comparison names every kind of planted difference; the workload does all it promises.
//!
//! Two plain one-member replica sets, started once for all tests here; each test has its own databases.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bson::{Document, doc, rawdoc};
use farshore_testkit::compare::{self, Comparison, Options};
use farshore_testkit::workload::{ConstantSum, Counters, Kind, Profile, Ratings, Until, Workload};
use mongodb::Client;
use tempfile::TempDir;

/// The server to run: `FARSHORE_MONGOD`, or what the set-up left in the cache.
fn binary() -> Result<PathBuf> {
    if let Ok(path) = std::env::var("FARSHORE_MONGOD") {
        return Ok(path.into());
    }
    let cache = PathBuf::from(std::env::var("HOME")?).join(".cache/farshore");
    find(&cache, 10).context("no mongod: set FARSHORE_MONGOD to the path of one")
}

fn find(directory: &Path, depth: u32) -> Option<PathBuf> {
    let entries: Vec<_> = directory.read_dir().ok()?.flatten().map(|e| e.path()).collect();
    let here = entries.iter().find(|path| path.ends_with("mongod") && path.is_file()).cloned();
    here.or_else(|| {
        let below = entries.iter().filter(|path| path.is_dir() && depth > 0);
        below.into_iter().find_map(|path| find(path, depth - 1))
    })
}

/// A mongod that dies with its guard.
struct Mongod {
    child: Child,
    port: u16,
    data: TempDir,
}

impl Drop for Mongod {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Mongod {
    async fn start() -> Result<(Self, Client)> {
        let binary = binary()?;
        let data = tempfile::tempdir()?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Self::spawn(&binary, data.path(), port)?;
        let mongod = Self { child, port, data };
        let client = Client::with_uri_str(mongod.uri(true)).await?;
        let member = format!("127.0.0.1:{port}");
        let config = doc! {
            "_id": "rs", "members": [{ "_id": 0, "host": member }],
            "settings": { "electionTimeoutMillis": 1000 },
        };
        client.database("admin").run_command(doc! { "replSetInitiate": config }).await?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let hello = client.database("admin").run_command(doc! { "hello": 1 }).await?;
            if hello.get_bool("isWritablePrimary").unwrap_or(false) {
                break;
            }
            ensure!(Instant::now() < deadline, "no primary");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let client = Client::with_uri_str(mongod.uri(false)).await?;
        Ok((mongod, client))
    }

    fn spawn(binary: &Path, data: &Path, port: u16) -> Result<Child> {
        Command::new(binary)
            .args(["--replSet", "rs", "--bind_ip", "127.0.0.1", "--wiredTigerCacheSizeGB", "0.25"])
            .args(["--port", &port.to_string()])
            .args(["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=0"])
            .arg("--dbpath")
            .arg(data)
            .arg("--logpath")
            .arg(data.join("log"))
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", binary.display()))
    }

    /// Kills it with SIGKILL and starts it again on the same data and port.
    fn crash_and_restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = Self::spawn(&binary()?, self.data.path(), self.port)?;
        Ok(())
    }

    fn uri(&self, direct: bool) -> String {
        let tail = if direct { "directConnection=true" } else { "replicaSet=rs" };
        format!("mongodb://127.0.0.1:{}/?{tail}", self.port)
    }
}

struct Pair {
    a: Client,
    b: Client,
    _servers: (Mongod, Mongod),
}

async fn pair() -> Result<Pair> {
    let ((left, a), (right, b)) = tokio::try_join!(Mongod::start(), Mongod::start())?;
    Ok(Pair { a, b, _servers: (left, right) })
}

fn kinds(comparison: &Comparison) -> Vec<&'static str> {
    comparison.differences.iter().map(|difference| difference.kind.name()).collect()
}

async fn both(pair: &Pair, db: &str, command: Document) -> Result<()> {
    for client in [&pair.a, &pair.b] {
        client.database(db).run_command(command.clone()).await?;
    }
    Ok(())
}

/// Plants one difference on the second side in a database of its own and expects just that name.
async fn planted(pair: &Pair, name: &str, setup: &[Document], change: Document) -> Result<()> {
    let db = format!("p_{}", name.replace(' ', "_"));
    for command in setup {
        both(pair, &db, command.clone()).await?;
    }
    let options = Options::for_databases(&db);
    let before = compare::compare(&pair.a, &pair.b, &options).await?;
    ensure!(before.is_equal(), "{name} before: {before}");
    let digests = compare::digest(&pair.a, &options).await?;
    ensure!(digests == compare::digest(&pair.b, &options).await?, "{name}: digests before");
    pair.b.database(&db).run_command(change).await?;
    let after = compare::compare(&pair.a, &pair.b, &options).await?;
    ensure!(kinds(&after) == [name], "planted {name}, found {after}");
    ensure!(after.to_string().contains(&db), "no namespace in {after}");
    ensure!(digests != compare::digest(&pair.b, &options).await?, "{name}: digests after");
    println!("{after}");
    Ok(())
}

#[tokio::test]
async fn every_kind_of_difference_is_named() -> Result<()> {
    let pair = pair().await?;
    let p = &pair;
    let insert = doc! { "insert": "c", "documents": [
        { "_id": 1, "x": 1, "y": { "p": 1, "q": 2 } }, { "_id": "k", "x": 2 }, { "_id": f64::NAN },
    ] };
    let set = |id: i32, u: Document| doc! { "update": "c", "updates": [{ "q": { "_id": id }, "u": u }] };
    let data = [insert.clone()];
    planted(p, "document different", &data, set(1, doc! { "$set": { "x": 1.0 } })).await?;
    let reordered = doc! { "x": 1, "y": { "q": 2, "p": 1 } };
    planted(p, "document field order", &data, set(1, reordered)).await?;
    let delete = doc! { "delete": "c", "deletes": [{ "q": { "_id": "k" }, "limit": 1 }] };
    planted(p, "document missing", &data, delete).await?;
    let extra = doc! { "insert": "c", "documents": [{ "_id": { "a": 1 }, "x": 1 }] };
    planted(p, "document extra", &data, extra).await?;
    planted(p, "collection extra", &data, doc! { "create": "more" }).await?;
    planted(p, "collection missing", &data, doc! { "drop": "c" }).await?;

    let index = |extra: Document| {
        let mut index = doc! { "key": { "x": 1, "y": -1 }, "name": "i" };
        index.extend(extra);
        doc! { "createIndexes": "c", "indexes": [index] }
    };
    planted(p, "index extra", &data, index(doc! {})).await?;
    let indexed = [
        insert.clone(),
        doc! { "createIndexes": "c", "indexes": [
            { "key": { "x": 1 }, "name": "i", "expireAfterSeconds": 1_000_000_000 }
        ] },
    ];
    planted(p, "index missing", &indexed, doc! { "dropIndexes": "c", "index": "i" }).await?;
    let expire = doc! { "collMod": "c", "index": { "name": "i", "expireAfterSeconds": 999_999_999 } };
    planted(p, "index different", &indexed, expire).await?;

    let validator = doc! { "collMod": "c", "validator": { "x": { "$gt": 0 } } };
    planted(p, "options", &data, validator).await?;
    let capped =
        [doc! { "create": "c", "capped": true, "size": 100_000 }, doc! { "insert": "c", "documents": [{ "_id": 1 }] }];
    let option = doc! { "insert": "c", "documents": [{ "_id": 2 }] };
    for command in &capped {
        both(p, "capped_order", command.clone()).await?;
    }
    let three = doc! { "insert": "c", "documents": [{ "_id": 3 }] };
    for (client, first, second) in [(&p.a, &option, &three), (&p.b, &three, &option)] {
        for command in [first, second] {
            client.database("capped_order").run_command(command.clone()).await?;
        }
    }
    let options = Options::for_databases("capped_order");
    let order = compare::compare(&p.a, &p.b, &options).await?;
    ensure!(kinds(&order) == ["natural order"], "{order}");
    ensure!(compare::digest(&p.a, &options).await? != compare::digest(&p.b, &options).await?);
    Ok(())
}

#[tokio::test]
async fn views_ids_and_limits() -> Result<()> {
    let pair = pair().await?;
    for (client, n, id) in [(&pair.a, 1, bson::Bson::Int32(7)), (&pair.b, 2, bson::Bson::Double(7.0))] {
        let db = client.database("v");
        let pipeline = vec![doc! { "$match": { "x": n } }];
        db.run_command(doc! { "create": "view", "viewOn": "c", "pipeline": pipeline }).await?;
        db.run_command(doc! { "insert": "ids", "documents": [{ "_id": id }, { "_id": "same" }] }).await?;
        let many: Vec<_> = (0..200).map(|i| doc! { "_id": i, "x": i * n }).collect();
        db.run_command(doc! { "insert": "many", "documents": many }).await?;
        let raw = rawdoc! { "create": "ci", "collation": { "locale": "en", "strength": 2 } };
        db.run_raw_command(raw).await?;
        let words = ["b", "A", "c", "D", "é"].map(|word| doc! { "_id": word });
        db.run_command(doc! { "insert": "ci", "documents": words.to_vec() }).await?;
        let series = doc! { "create": "ts", "timeseries": { "timeField": "t" } };
        db.run_command(series).await?;
        let point = doc! { "_id": 1, "t": bson::DateTime::from_millis(1_735_689_600_000), "n": n };
        db.run_command(doc! { "insert": "ts", "documents": [point] }).await?;
    }
    let options = Options { max_differences: 500, ..Options::for_databases("v") };
    let found = compare::compare(&pair.a, &pair.b, &options).await?;
    let of = |namespace: &str| -> Vec<_> {
        let all = found.differences.iter();
        all.filter(|d| d.namespace == namespace).map(|d| d.kind.name()).collect()
    };
    assert_eq!(of("v.view"), ["options"], "{found}");
    assert_eq!(of("v.ids"), ["document different"], "{found}");
    assert_eq!(of("v.ci"), [""; 0], "{found}");
    assert_eq!(of("v.many").len(), 199, "{found}");
    assert_eq!(of("v.ts"), ["document missing", "document extra"], "{found}");

    let few = Options { max_differences: 5, ..Options::for_databases("v") };
    let found = compare::compare(&pair.a, &pair.b, &few).await?;
    assert_eq!((found.differences.len(), found.more), (5, 198), "{found}");
    let skip = ["v.view", "v.ids", "v.many", "v.ts"].map(str::to_owned).to_vec();
    let skipping = Options { skip, ..Options::for_databases("v") };
    compare::compare(&pair.a, &pair.b, &skipping).await?.ensure_equal()?;
    Ok(())
}

#[tokio::test]
async fn a_workload_covers_every_kind_and_repeats_itself() -> Result<()> {
    let pair = pair().await?;
    let profile = Profile { large: 2, large_budget: 60 << 20, ..Profile::default() };
    let kinds: Vec<Kind> = profile.kinds().collect();
    let first = Workload::new(11, profile.clone(), "w");
    let second = Workload::new(11, profile, "w");
    let begin = Instant::now();
    let counts = first.run(&pair.a, Until::Operations(3_000)).await?;
    println!("{counts}in {:?}", begin.elapsed());
    assert_eq!(counts.missing(kinds), [""; 0], "{counts}");
    assert_eq!(counts.retries, 0, "{counts}");
    first.check_counters(&pair.a).await?;

    assert_eq!(second.run(&pair.b, Until::Operations(3_000)).await?, counts);
    let begin = Instant::now();
    let equal = compare::compare(&pair.a, &pair.b, &Options::default()).await?;
    equal.ensure_equal()?;
    println!("{equal} in {:?}", begin.elapsed());
    let options = Options::default();
    let digest = compare::digest(&pair.a, &options).await?;
    println!("{digest}");
    assert_eq!(digest, compare::digest(&pair.b, &options).await?);
    assert_eq!((digest.documents, digest.indexes), (equal.documents, equal.indexes));
    first.check_counters(&pair.b).await?;

    let more = second.run(&pair.b, Until::Operations(50)).await?;
    assert!(more.done() > 0 && digest != compare::digest(&pair.b, &options).await?);
    assert!(!compare::compare(&pair.a, &pair.b, &options).await?.is_equal());
    Ok(())
}

#[tokio::test]
async fn beyond_the_spine_and_with_many_writers() -> Result<()> {
    let (_server, client) = Mongod::start().await?;
    let profile = Profile { beyond_spine: true, writers: 4, ..Profile::default() };
    let workload = Workload::new(5, profile.clone(), "m");
    let counts = workload.run(&client, Until::Elapsed(Duration::from_secs(6))).await?;
    println!("{counts}");
    assert!(counts.done() > 500, "{counts}");
    workload.check_counters(&client).await?;
    compare::compare(&client, &client, &Options::default()).await?.ensure_equal()?;
    Ok(())
}

#[tokio::test]
async fn small_workloads_hold_their_invariants() -> Result<()> {
    let (_server, client) = Mongod::start().await?;
    let mut bank = ConstantSum::new(1, "bank", 10);
    assert_eq!(bank.check(&client).await?, None);
    bank.load(&client).await?;
    let expected = bank.expected();
    let reader = ConstantSum::new(1, "bank", 10);
    let (transfers, ()) = tokio::try_join!(bank.run(&client, Until::Operations(200)), async {
        for _ in 0..50 {
            ensure!(reader.check(&client).await? == Some(expected));
        }
        Ok(())
    })?;
    assert!(transfers >= 190, "{transfers}");
    let half = doc! { "update": "savings", "updates": [
        { "q": { "_id": 1 }, "u": { "$inc": { "balance": 1_i64 } } },
    ] };
    client.database("bank").run_command(half).await?;
    let deadline = Instant::now() + Duration::from_secs(10);
    // The snapshot read sees what the majority has, a moment later.
    while reader.check(&client).await.is_ok() {
        ensure!(Instant::now() < deadline, "half a transaction was not noticed");
    }

    let mut counters = Counters::new(2, "counting");
    assert_eq!(counters.run(&client, Until::Operations(100)).await?, 100);
    counters.check(&client).await?;
    let twice = doc! { "update": "counters", "updates": [
        { "q": {}, "u": { "$inc": { "n": 1_i64 } } },
    ] };
    client.database("counting").run_command(twice).await?;
    let noticed = counters.check(&client).await;
    assert!(noticed.is_err(), "an increment applied twice was not noticed");

    let mut ratings = Ratings::new(3, "ratings");
    ratings.load(&client, 1_500).await?;
    let until = Until::Elapsed(Duration::from_secs(20));
    assert_eq!(ratings.run(&client, 500, 100, until).await?, 100);
    let found = client.database("ratings").collection::<Document>("ratings");
    assert_eq!(found.count_documents(doc! {}).await?, 1_600);
    Ok(())
}

/// Operations the server has answered since it started; none while it is down.
async fn served(client: &Client) -> Option<i64> {
    let status = client.database("admin").run_command(doc! { "serverStatus": 1 }).await.ok()?;
    let counters = status.get_document("opcounters").ok()?;
    let count = |name| counters.get(name).and_then(|n| n.as_i64());
    Some(count("insert")? + count("update")?)
}

#[tokio::test]
async fn a_workload_outlives_crashes_of_its_primary() -> Result<()> {
    let (mut server, client) = Mongod::start().await?;
    let profile = Profile { writers: 2, ..Profile::default() };
    let workload = Workload::new(21, profile, "k");
    let done = Arc::new(AtomicBool::new(false));
    let crashes = async {
        let deadline = Instant::now() + Duration::from_secs(90);
        for _ in 0..3 {
            while served(&client).await.is_none_or(|count| count < 300) {
                ensure!(Instant::now() < deadline, "no progress after a crash");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            server.crash_and_restart()?;
        }
        while served(&client).await.is_none_or(|count| count < 100) {
            ensure!(Instant::now() < deadline, "no progress after the last crash");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        done.store(true, Ordering::Relaxed);
        Ok(())
    };
    let (counts, ()) = tokio::try_join!(workload.run(&client, Until::Flag(done.clone())), crashes)?;
    println!("{counts}");
    assert!(counts.retries > 0, "{counts}");
    workload.check_counters(&client).await?;
    Ok(())
}
