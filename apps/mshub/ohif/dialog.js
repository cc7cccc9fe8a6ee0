/* A question with two or three answers, asked in a modal dialog; Escape is the last answer. */

import { element } from './dom.js';

/**
 * @param {{title: string, text: string, choices: Object<string, string>}} question the first choice is the default, the
 *   last one the way out
 * @returns {Promise<string>} the key of the choice
 */
export function ask({ title, text, choices }) {
  const keys = Object.keys(choices);
  return new Promise(resolve => {
    const dialog = element('dialog', { class: 'mshub-dialog', 'aria-label': title, 'data-cy': 'mshub-dialog' });
    const answer = key => () => dialog.close(key);
    dialog.append(
      element('h2', {}, title),
      element('p', {}, text),
      element(
        'div',
        { class: 'mshub-row mshub-choices' },
        keys.map((key, at) => {
          const look = at === 0 ? 'mshub-primary' : '';
          return element(
            'button',
            { class: look, onclick: answer(key), 'data-cy': `mshub-dialog-${key}` },
            choices[key]
          );
        })
      )
    );
    dialog.addEventListener('keydown', event => event.stopPropagation());
    dialog.addEventListener('close', () => {
      dialog.remove();
      resolve(dialog.returnValue || keys.at(-1));
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
