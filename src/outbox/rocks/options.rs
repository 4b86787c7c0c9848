//! How RocksDB is set up: a log that is written once, within a fixed amount of memory.

use rocksdb::{BlockBasedOptions, Cache, DBCompressionType, DBRecoveryMode, LogLevel, Options};

use crate::outbox::EncryptionKey;

/// Memtable of one log: also the size of its files, hence the grain of reclaiming.
pub(super) const FILE_BYTES: usize = 8 << 20;
/// A write-ahead log this large makes RocksDB flush whatever pins it.
const WAL_BYTES: u64 = 64 << 20;
/// Open table files; each costs a descriptor and a few KiB.
const OPEN_FILES: i32 = 256;

/// How to open a [`RocksStore`].
#[derive(Clone, Debug)]
pub struct RocksOptions {
    /// Encrypts what is written from now on; what is there must be plain or of the same key.
    pub key: Option<EncryptionKey>,
    /// About how much memory RocksDB may use, in bytes.
    pub memory: usize,
}

impl Default for RocksOptions {
    fn default() -> Self {
        Self { key: None, memory: 48 << 20 }
    }
}

impl RocksOptions {
    pub(super) fn database(&self) -> Options {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_max_total_wal_size(WAL_BYTES);
        options.set_db_write_buffer_size(self.memory / 2);
        options.set_max_open_files(OPEN_FILES);
        options.set_max_background_jobs(2);
        options.set_bytes_per_sync(1 << 20);
        options.set_max_manifest_file_size(4 << 20);
        options.set_keep_log_file_num(2);
        options.set_max_log_file_size(1 << 20);
        options.set_log_level(LogLevel::Warn);
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options
    }

    /// Records: keys only grow, so files never overlap, and two levels with trivial moves need no rewriting.
    pub(super) fn records(&self, cache: &Cache) -> Options {
        let mut options = Options::default();
        options.set_num_levels(2);
        options.set_level_zero_file_num_compaction_trigger(2);
        options.set_write_buffer_size(FILE_BYTES.min(self.memory / 4));
        options.set_max_write_buffer_number(3);
        options.set_target_file_size_base(FILE_BYTES as u64);
        options.set_compression_type(DBCompressionType::None);
        options.set_ttl(0);
        options.set_periodic_compaction_seconds(0);
        options.set_block_based_table_factory(&table(cache));
        options
    }

    pub(super) fn state(&self, cache: &Cache) -> Options {
        let mut options = Options::default();
        options.set_write_buffer_size(2 << 20);
        options.set_compression_type(DBCompressionType::None);
        options.set_block_based_table_factory(&table(cache));
        options
    }
}

fn table(cache: &Cache) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_block_size(16 << 10);
    table
}
