//! Memory of the flow table, in huge pages where the kernel has some.
//!
//! Whoever looks up one of many flows waits for memory, and before that for the address: with pages of 4 kB the processor's table of
//! addresses (some 2,000 entries) is full at 8 MB, and walking the page tables costs more than the entry itself, in a virtual machine
//! twice as much. The shards' tables are smaller than a huge page, so that several share one.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use allocator_api2::alloc::{AllocError, Allocator, Global};

use super::lock;

/// A huge page of x86-64, and of arm64 with pages of 4 kB.
const HUGE_PAGE: usize = 2 << 20;

/// Tables below this size lie anywhere: all shards' together fit the processor's table of addresses.
const LEAST: usize = 32 << 10;

/// Blocks start at cache lines.
const BLOCK_ALIGN: usize = 64;

/// Gives blocks out of huge pages. Clones share their pages.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages(Arc<Mutex<Vec<Page>>>);

/// A huge page cut into blocks of one size. Shards grow at about the same time, so that a page empties soon after the first of its blocks
/// is given back.
#[derive(Debug)]
struct Page {
    start: NonNull<u8>,
    block: usize,
    free: Vec<usize>,
}

// SAFETY: the memory belongs to the page alone, and nothing in it is bound to a thread.
unsafe impl Send for Page {}

impl Page {
    /// Memory of whole huge pages.
    fn layout(bytes: usize) -> Result<Layout, AllocError> {
        let bytes = bytes.checked_next_multiple_of(HUGE_PAGE).ok_or(AllocError)?;
        Layout::from_size_align(bytes, HUGE_PAGE).map_err(|_| AllocError)
    }

    fn allocate(bytes: usize) -> Result<NonNull<u8>, AllocError> {
        let memory = Global.allocate(Self::layout(bytes)?)?;
        // A kernel without huge pages says no, and gives small ones.
        // SAFETY: the pointer and length are those of the memory just allocated, which the advice leaves as it is.
        unsafe { libc::madvise(memory.as_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
        // A table is written to all over from the start, so all of it is needed now: the kernel clears it at once, and not while records
        // come. One before Linux 5.14 says no.
        // SAFETY: as above; what it clears was never written to.
        unsafe { libc::madvise(memory.as_ptr().cast(), memory.len(), libc::MADV_POPULATE_WRITE) };
        Ok(memory.cast())
    }

    fn blocks(block: usize) -> usize {
        HUGE_PAGE / block
    }
}

/// Where a table of this layout belongs.
enum Place {
    Anywhere,
    Block(usize),
    Whole,
}

fn place(layout: Layout) -> Place {
    if layout.size() < LEAST || layout.align() > BLOCK_ALIGN {
        Place::Anywhere
    } else if layout.size() > HUGE_PAGE / 2 {
        Place::Whole
    } else {
        Place::Block(layout.size().next_multiple_of(BLOCK_ALIGN))
    }
}

// SAFETY: a block is given to nobody else until it is given back, stays where it is whatever becomes of the clones that share the
// pages (each keeps them, and pages are freed only when all of their blocks have been given back), and is as large as was asked for.
unsafe impl Allocator for Pages {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        let start = match place(layout) {
            Place::Anywhere => return Global.allocate(layout),
            Place::Whole => Page::allocate(layout.size())?,
            Place::Block(block) => {
                let mut pages = lock(&self.0);
                let mut found = pages.iter().position(|page| page.block == block && !page.free.is_empty());
                if found.is_none() {
                    let free = (0..Page::blocks(block)).rev().collect();
                    pages.push(Page { start: Page::allocate(HUGE_PAGE)?, block, free });
                    found = pages.len().checked_sub(1);
                }
                let page = found.and_then(|at| pages.get_mut(at)).ok_or(AllocError)?;
                let index = page.free.pop().ok_or(AllocError)?;
                // SAFETY: a page has as many blocks as fit in it.
                unsafe { page.start.add(index * block) }
            }
        };
        Ok(NonNull::slice_from_raw_parts(start, layout.size()))
    }

    unsafe fn deallocate(&self, start: NonNull<u8>, layout: Layout) {
        match place(layout) {
            // SAFETY: the caller says that it came from here, and then it came from there.
            Place::Anywhere => unsafe { Global.deallocate(start, layout) },
            Place::Whole => {
                if let Ok(layout) = Page::layout(layout.size()) {
                    // SAFETY: as above, with the layout it was allocated by.
                    unsafe { Global.deallocate(start, layout) };
                }
            }
            Place::Block(block) => {
                let mut pages = lock(&self.0);
                let within = |page: &Page| start.addr().get().checked_sub(page.start.addr().get());
                let found = pages.iter().position(|page| within(page).is_some_and(|at| at < HUGE_PAGE));
                let Some(at) = found else { return };
                let page = &mut pages[at];
                page.free.extend(within(page).map(|offset| offset / block));
                if page.free.len() == Page::blocks(block) {
                    let page = pages.swap_remove(at);
                    if let Ok(layout) = Page::layout(HUGE_PAGE) {
                        // SAFETY: allocated by this layout, and no block of it is in use.
                        unsafe { Global.deallocate(page.start, layout) };
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 16).expect("a layout")
    }

    #[test]
    fn blocks_do_not_overlap_and_pages_go_when_they_are_empty() {
        let pages = Pages::default();
        let clone = pages.clone();
        let mut blocks = Vec::new();
        for (round, bytes) in [LEAST, 182_288, LEAST - 16, HUGE_PAGE / 2, HUGE_PAGE / 2 + 16, 3 * HUGE_PAGE]
            .into_iter()
            .cycle()
            .take(120)
            .enumerate()
        {
            let memory = pages.allocate(layout(bytes)).expect("memory");
            // SAFETY: as many bytes as were asked for, and nobody else's.
            unsafe { memory.cast::<u8>().write_bytes(round as u8, bytes) };
            blocks.push((memory.cast::<u8>(), bytes, round as u8));
        }
        assert_eq!(lock(&pages.0).iter().filter(|page| page.block == LEAST).count(), 1, "many share a page");
        for (start, bytes, filling) in blocks {
            // SAFETY: written above.
            let whole = unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) };
            assert!(whole.iter().all(|byte| *byte == filling), "{bytes} bytes were overwritten");
            // SAFETY: it came from there, by this layout.
            unsafe { clone.deallocate(start, layout(bytes)) };
        }
        assert!(lock(&pages.0).is_empty());
    }
}
