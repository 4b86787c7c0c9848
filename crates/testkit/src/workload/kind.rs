//! The kinds of operation a workload knows, with their class and weight inside the class.

/// Which share of a profile an operation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    Crud,
    Transaction,
    Ddl,
    /// Documents of 100 KB to 15.9 MB.
    Large,
    /// Not replicated by the spine: capped, time series, `$out`, `$merge`.
    Beyond,
}

macro_rules! kinds {
    ($($class:ident { $($kind:ident = $name:literal * $weight:literal,)* })*) => {
        /// One kind of operation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($($kind,)*)* }

        impl Kind {
            /// Every kind, in declaration order.
            pub const ALL: &[Kind] = &[$($(Kind::$kind,)*)*];

            /// The name used in counts and errors.
            pub fn name(self) -> &'static str {
                match self { $($(Kind::$kind => $name,)*)* }
            }

            /// The share it is drawn from.
            pub fn class(self) -> Class {
                match self { $($(Kind::$kind => Class::$class,)*)* }
            }

            pub(super) fn weight(self) -> u32 {
                match self { $($(Kind::$kind => $weight,)*)* }
            }
        }
    };
}

kinds! {
    Crud {
        InsertOne = "insert one" * 20,
        InsertMany = "insert many" * 8,
        InsertBypass = "insert past the validator" * 2,
        InsertDuplicateKeys = "insert duplicate keys" * 2,
        InsertOdd = "insert odd field names" * 4,
        InsertWide = "insert a thousand fields" * 1,
        SetTop = "$set top level" * 10,
        SetNested = "$set nested" * 6,
        SetNewNested = "$set new nested fields" * 4,
        SetMany = "$set many new fields" * 3,
        SetArrayIndex = "$set array index" * 6,
        SetPadded = "$set past the end of an array" * 2,
        SetInArrayDocument = "$set inside an array's document" * 4,
        SetNumericName = "$set numeric name" * 4,
        SetLeadingZero = "$set name with leading zeros" * 3,
        SetArrayFilter = "$set with array filter" * 3,
        Unset = "$unset" * 4,
        Inc = "$inc" * 6,
        MinMax = "$min, $max, $mul" * 2,
        Push = "$push" * 6,
        PushSlice = "$push with $slice" * 4,
        PushSliceZero = "$push with $slice 0" * 2,
        Pop = "$pop" * 4,
        Pull = "$pull" * 4,
        Rename = "$rename" * 3,
        PipelineShrink = "pipeline shrink and set" * 6,
        PipelineNewFields = "pipeline new fields z, b, aa" * 5,
        PipelineReplace = "pipeline $replaceWith" * 3,
        PipelineReorder = "pipeline reorder" * 3,
        SetDotted = "$setField of odd name" * 5,
        UnsetDotted = "$unsetField of odd name" * 3,
        SetBesideDotted = "$set a.b beside a literal a.b" * 3,
        UpdateDuplicateKeys = "update a document with duplicate keys" * 2,
        ThousandPaths = "$set of a thousand paths" * 2,
        ReplaceHalf = "replace dropping half" * 5,
        ReplaceReordered = "replace reordered" * 4,
        Upsert = "upsert by operators" * 4,
        UpsertReplace = "upsert by replacement" * 3,
        UpdateMany = "update many" * 4,
        BulkUpdate = "updates in one command" * 4,
        HotDocument = "hot document" * 6,
        FindAndModify = "findAndModify" * 4,
        FindAndRemove = "findAndModify remove" * 2,
        DeleteOne = "delete one" * 8,
        DeleteMany = "delete many" * 3,
        IdTypeSwap = "_id of another numeric type" * 4,
        UniqueSwap = "unique values swapped" * 4,
        UniqueReuse = "unique value reused" * 4,
        CounterInc = "counter $inc" * 8,
    }
    Transaction {
        TxnCommit = "transaction" * 8,
        TxnCreate = "transaction that creates" * 2,
        TxnAbort = "transaction aborted" * 3,
    }
    Ddl {
        CreatePlain = "create" * 4,
        CreateValidator = "create with validator" * 2,
        CreateCollation = "create with collation" * 2,
        CreateClustered = "create clustered" * 2,
        Drop = "drop" * 2,
        DropRecreate = "drop and recreate" * 3,
        DropDatabase = "dropDatabase and recreate" * 1,
        RenameCollection = "renameCollection" * 3,
        RenameDropTarget = "rename with dropTarget" * 2,
        RenameChain = "rename a to b to c" * 2,
        IndexUnique = "index unique" * 2,
        IndexSparse = "index sparse" * 2,
        IndexPartial = "index partial" * 2,
        IndexTtl = "index TTL" * 3,
        IndexHidden = "index hidden" * 2,
        IndexCompound = "index compound" * 2,
        IndexText = "index text" * 2,
        IndexGeo = "index 2dsphere" * 2,
        IndexWildcard = "index wildcard" * 2,
        IndexHashed = "index hashed" * 2,
        IndexCollation = "index with collation" * 2,
        IndexDrop = "dropIndexes one" * 3,
        IndexDropAll = "dropIndexes all" * 2,
        CollModHidden = "collMod hidden" * 3,
        CollModValidator = "collMod validator" * 2,
        CollModLevel = "collMod validationLevel" * 2,
        CollModExpire = "collMod expireAfterSeconds" * 3,
        ViewCreate = "view create" * 4,
        ViewMod = "view collMod" * 3,
        ViewDrop = "view drop" * 2,
        ViewChain = "view on a view" * 3,
    }
    Large {
        InsertLarge = "insert large" * 3,
        UpdateLarge = "update in a large document" * 4,
        ReplaceLarge = "replace large" * 2,
        EventOverLimit = "event over 16 MB" * 1,
    }
    Beyond {
        CappedCreate = "capped create" * 1,
        CappedInsert = "capped insert" * 6,
        TimeseriesCreate = "time series create" * 1,
        TimeseriesInsert = "time series insert" * 6,
        Out = "$out" * 2,
        Merge = "$merge" * 2,
    }
}
