/* The keys of the MSHub mode, beside OHIF's own (b brush, e eraser, [ and ] brush size, ctrl+z and ctrl+y). */

export const KEYS = [
  { commandName: 'mshubSegment', label: 'MSHub: segment', keys: ['shift+a'], isEditable: true },
  { commandName: 'mshubSubmit', label: 'MSHub: submit', keys: ['shift+s'], isEditable: true },
  { commandName: 'mshubNext', label: 'MSHub: next case', keys: ['shift+n'], isEditable: true },
];
