//! Tables that were computed before, for planners that live in one process: a simulator has a thousand members with one view.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use phalanx_flow::slots::{BackendTable, RankedBackend};
use phalanx_flow::table::{RankedMember, RankingError, RowTable};
use phalanx_flow::{BackendId, BackendIndex};
use phalanx_forwarder::SlotSet;

/// A service's ranking key and its backends, by id.
type Backends = ([u64; 2], Vec<RankedBackend>);

/// See the module's doc. It forgets nothing, so it is not for a daemon, which has one planner and no use for it.
///
/// A table depends on nothing but what it is asked for by, so planners with one of these behave like planners without.
#[derive(Debug, Default)]
pub struct SharedTables(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    members: HashMap<Vec<RankedMember>, Arc<RowTable>>,
    backends: HashMap<Backends, Arc<BackendTable>>,
    changes: HashMap<(Backends, Backends), Option<Arc<SlotSet>>>,
    slots: HashMap<(Backends, Vec<BackendIndex>), Arc<[BackendIndex]>>,
}

impl SharedTables {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table of these members, all planners being of one cluster; `like` is one of it, for what is to be made anew.
    pub(crate) fn rows(
        &self,
        like: &RowTable,
        members: &[RankedMember],
    ) -> Result<Arc<RowTable>, RankingError> {
        let mut by = members.to_vec();
        by.sort_unstable_by_key(|member| member.id);
        if let Some(known) = self.lock().members.get(&by) {
            return Ok(Arc::clone(known));
        }
        let mut table = like.clone();
        table.set_members(&by)?;
        let table = Arc::new(table);
        self.lock().members.insert(by, Arc::clone(&table));
        Ok(table)
    }

    /// The table that `table` becomes with these backends.
    pub(crate) fn backends(&self, table: &BackendTable, usable: &[RankedBackend]) -> Arc<BackendTable> {
        let by = (table.key(), sorted(usable));
        if let Some(known) = self.lock().backends.get(&by) {
            return Arc::clone(known);
        }
        let mut table = table.clone();
        table.set_backends(&by.1);
        let table = Arc::new(table);
        self.lock().backends.insert(by, Arc::clone(&table));
        table
    }

    /// The slots in which two tables of one service differ, if there are any.
    pub(crate) fn changes(&self, old: &BackendTable, new: &BackendTable) -> Option<Arc<SlotSet>> {
        let by = ((old.key(), old.backends()), (new.key(), new.backends()));
        if let Some(known) = self.lock().changes.get(&by) {
            return known.clone();
        }
        let changes = changed_slots(old, new).map(Arc::new);
        self.lock().changes.insert(by, changes.clone());
        changes
    }

    /// [`BackendTable::to_indexes`].
    pub(crate) fn slots(
        &self,
        table: &BackendTable,
        index_of: impl Fn(&BackendId) -> BackendIndex,
    ) -> Arc<[BackendIndex]> {
        let backends = table.backends();
        let indexes = backends.iter().map(|backend| index_of(&backend.id)).collect();
        let by = ((table.key(), backends), indexes);
        if let Some(known) = self.lock().slots.get(&by) {
            return Arc::clone(known);
        }
        let slots: Arc<[BackendIndex]> = table.to_indexes(index_of).into();
        self.lock().slots.insert(by, Arc::clone(&slots));
        slots
    }
}

fn sorted(usable: &[RankedBackend]) -> Vec<RankedBackend> {
    let mut sorted = usable.to_vec();
    sorted.sort_unstable_by_key(|backend| (backend.id, std::cmp::Reverse(backend.weight)));
    sorted.dedup_by_key(|backend| backend.id);
    sorted
}

/// The slots in which two tables of one service differ, if there are any.
pub(crate) fn changed_slots(old: &BackendTable, new: &BackendTable) -> Option<SlotSet> {
    let mut changed = old.changed_slots(new).peekable();
    changed.peek()?;
    Some(SlotSet::new(changed))
}
